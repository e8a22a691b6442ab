"""Prompts as text: rows for every answer, checks that name a prompt, vocabularies of whole words."""

import pytest
import torch

from dynamics.tasks import Prompt, PromptError, Vocabulary
from dynamics.tasks.text import Question, batch, contrasts, of_tokenizer
from dynamics.tasks.words import CAPITALIZED, COUNTRIES, FILLERS, NAMES, PLACES, THINGS
from tests.zoo.languages import WholeWords

WORDS = Vocabulary.of("a b c d e f x y z")


# --- vocabularies -----------------------------------------------------------------------------------------


def test_a_vocabulary_reads_words_and_marks_and_writes_them_again():
    words = Vocabulary.of("Ask Spain its capital:", "Spain, (a)")
    assert words.words == ("Ask", "Spain", "its", "capital", ":", ",", "(", "a", ")")
    assert words.encode("Ask Spain: a") == [0, 1, 4, 7]
    assert words.encode(" Spain") == [1]
    assert words.decode([0, 1, 4]) == "Ask Spain :"
    assert len(words) == 9


def test_an_unknown_word_is_named():
    with pytest.raises(ValueError, match=r"'a q b' has the words \['q'\]"):
        WORDS.encode("a q b")


def test_no_word_is_listed_twice_or_has_a_space():
    for words in (NAMES, PLACES, THINGS, FILLERS, list(COUNTRIES)):
        assert len(set(words)) == len(words)
        assert all(word.isalpha() for word in words)
    assert not set(FILLERS) & {*COUNTRIES, *(w for answers in COUNTRIES.values() for w in answers)}
    assert not set(NAMES) & {*PLACES, *THINGS}
    assert all(word.isalpha() for words in CAPITALIZED.values() for word in words)


# --- rows -------------------------------------------------------------------------------------------------


def test_a_question_has_a_row_for_every_answer_with_those_before_it_shown():
    found = batch(
        WORDS.encode,
        [
            Question("a b", ("c", "d"), (("x", "y"), ("y", "z"))),
            Question("b a", ("e", "f"), (("z", "x"), ("x", "y"))),
        ],
    )
    assert [WORDS.decode(row) for row in found.tokens] == ["a b c", "a b c", "b a e", "b a e"]
    assert found.target_pos.tolist() == [1, 2, 1, 2]
    assert WORDS.decode(found.targets) == "c d e f"
    assert [WORDS.decode(row) for row in found.distractors] == ["x y", "y z", "z x", "x y"]
    assert found.example_ids.tolist() == [0, 0, 1, 1]


def test_other_words_can_be_shown_and_some_answers_alone_scored():
    (question,) = [Question("a", ("b", "c", "d"), shown=("x", "y"), scored=(0, 2))]
    found = batch(WORDS.encode, [question])
    assert [WORDS.decode(row) for row in found.tokens] == ["a x y", "a x y"]
    assert found.target_pos.tolist() == [0, 2]
    assert WORDS.decode(found.targets) == "b d"
    assert found.distractors is None


def test_questions_of_another_length_are_named():
    with pytest.raises(PromptError, match=r"'a b c' has 3 tokens, but 'a b' has 2"):
        batch(WORDS.encode, [Question("a b", ("x",)), Question("a b c", ("x",))])


@pytest.mark.parametrize("wrong", [("x y",), ("",)])
def test_an_answer_or_a_wrong_one_of_no_single_token_is_named_with_its_prompt(wrong):
    with pytest.raises(
        PromptError, match=rf"'{wrong[0]}', an answer to 'a b', is \d tokens .*; it must be one"
    ):
        batch(WORDS.encode, [Question("a b", wrong)])
    with pytest.raises(PromptError, match=r"an answer to 'a b'"):
        batch(WORDS.encode, [Question("a b", ("c",), (wrong,))])


# --- contrasts --------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_contrast_corrupted_to_clean_with_its_probe():
    prompt = Prompt(
        Question("a b", ("x",)), Question("a c", ("x",)), (Question("b", ("x",)),), {"example": "one"}
    )
    (found,) = contrasts(WORDS.encode, [prompt])
    assert (WORDS.decode(found.base.tokens[0]), WORDS.decode(found.source.tokens[0])) == ("a c", "a b")
    assert WORDS.decode(found.probe.tokens[0]) == "b"
    assert found.coords == {"example": "one"}
    (bare,) = contrasts(WORDS.encode, [Prompt(prompt.clean, prompt.corrupted)])
    assert bare.probe is None


def test_clean_and_corrupted_prompts_of_another_length_are_named():
    prompt = Prompt(Question("a b", ("x",)), Question("a b c", ("x",)))
    with pytest.raises(PromptError, match=r"'a b' has 2 tokens, but 'a b c' has 3"):
        contrasts(WORDS.encode, [prompt])


def test_a_prompt_longer_than_those_before_it_is_named():
    prompts = [
        Prompt(Question(text, ("x",)), Question(other, ("x",)))
        for text, other in (("a b", "a c"), ("a b c", "a b d"))
    ]
    with pytest.raises(PromptError, match=r"'a b d' has 3 tokens, but 'a c' has 2"):
        contrasts(WORDS.encode, prompts)


def test_a_tokenizer_reads_a_prefix_before_clean_corrupted_and_probe():
    tokenizer = WholeWords()
    prompt = Prompt(Question("a b", ("x",)), Question("a c", ("x",)), (Question("b", ("x",)),))
    (found,) = of_tokenizer(tokenizer, [prompt], "BOS ")
    texts = [tokenizer.decode(b.tokens[0]) for b in (found.base, found.source, found.probe)]
    assert texts == ["BOS a c", "BOS a b", "BOS b"]
    assert torch.equal(found.base.target_pos, torch.tensor([2]))
