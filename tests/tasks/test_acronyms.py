"""Acronyms: rows per letter, triples held out, what corruptions change, the text format of the seed."""

from dataclasses import replace

import pytest
import torch

from dynamics import measures
from dynamics.batch import concatenate
from dynamics.config import AcronymsConfig, AcronymsRun, ConfigError, ToyConfig
from dynamics.tasks import PromptError, acronyms
from dynamics.tasks.words import CAPITALIZED
from tests.zoo.languages import WholeWords, acronyms_task, words_of

TRIPLES = [
    ("Chief", "Earth", "Oil"),
    ("Air", "Bank", "City"),
    ("Day", "Game", "Hall"),
    ("Key", "Law", "Media"),
]


def test_every_capitalized_word_begins_with_its_letter():
    for initial, words in CAPITALIZED.items():
        assert {word[0] for word in words} == {initial}
        assert len(set(words)) == len(words) == 8
    assert len(CAPITALIZED) == 22


def test_a_prompt_has_three_rows_and_each_asks_for_the_initial_of_one_word():
    task = acronyms_task()
    rows = task.rows("learn")
    assert len(rows) == 3 * 300
    for place, text in enumerate(words_of(task, rows[:60])):
        the, a, b, c, bracket, first, second = text.split()
        assert (the, bracket) == ("The", "(")
        assert (first, second) == (a[0], b[0])
        row = rows[place : place + 1]
        assert row.target_pos.item() == 4 + place % 3
        assert task.vocabulary.decode(row.targets) == (a, b, c)[place % 3][0]


def test_triples_are_different_and_held_out_ones_are_never_trained():
    triples = acronyms_task(n_prompts=2000).triples
    held, trained = set(triples["heldout"]), set(triples["trained"])
    assert (len(held), len(trained)) == (256, 2000)
    assert not held & trained


def test_no_training_row_reads_a_held_out_triple():
    task = acronyms_task()
    trained = {tuple(text.split()[1:4]) for text in words_of(task, task.rows("learn"))}
    held = {tuple(text.split()[1:4]) for text in words_of(task, task.evaluation["heldout"])}
    assert trained == set(task.triples["trained"])
    assert held == set(task.triples["heldout"])


def test_the_same_seed_gives_the_same_words_and_triples_and_another_seed_others():
    one, same, other = acronyms_task(), acronyms_task(), acronyms_task(seed=1)
    assert one.words == same.words != other.words
    assert one.triples == same.triples != other.triples
    assert torch.equal(one.batch(3).tokens, same.batch(3).tokens)


def test_a_contrast_of_all_words_has_another_prompts_words_and_a_thirds_letters():
    task = acronyms_task()
    contrasts = task.contrasts(n=5)
    triples = task.triples["heldout"][:5]
    assert len(contrasts) == 5
    for n, contrast in enumerate(contrasts):
        clean, corrupted = (words_of(task, side)[0].split() for side in (contrast.source, contrast.base))
        other, third = triples[(n + 1) % 5], triples[(n + 2) % 5]
        assert tuple(clean[1:4]) == triples[n]
        assert clean[5:] == [word[0] for word in triples[n][:2]]
        assert tuple(corrupted[1:4]) == other
        assert corrupted[5:] == [word[0] for word in third[:2]]
        assert task.vocabulary.decode(contrast.base.targets) == " ".join(contrast.coords["acronym"])
        assert torch.equal(contrast.base.targets, contrast.source.targets)
        assert contrast.base.tokens.shape == contrast.source.tokens.shape == (3, 7)


def test_a_contrast_of_the_current_word_changes_it_alone_and_scores_its_letter():
    task = acronyms_task()
    for n, contrast in enumerate(task.contrasts("current", n=5)):
        place = n % 3
        clean, corrupted = (words_of(task, side)[0].split() for side in (contrast.source, contrast.base))
        changed = [i for i, (one, two) in enumerate(zip(clean, corrupted, strict=True)) if one != two]
        assert changed == [1 + place]
        assert corrupted[1 + place][0] != clean[1 + place][0]
        assert contrast.coords["letter"] == place + 1
        assert contrast.base.target_pos.tolist() == [4 + place]
        assert task.vocabulary.decode(contrast.base.targets) == clean[1 + place][0]


def test_distractors_are_the_other_capitals_and_the_margin_is_over_the_best_of_them():
    task = acronyms_task()
    source = task.contrasts(n=3)[0].source
    letters = [
        {task.vocabulary.decode([token]) for token in row} | {task.vocabulary.decode([target])}
        for row, target in zip(source.distractors, source.targets, strict=True)
    ]
    assert source.distractors.shape == (3, 25)
    assert letters == [set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")] * 3
    logits = torch.randn(3, task.d_vocab, generator=torch.manual_seed(0))
    expected = [
        logits[i, source.targets[i]].item() - max(logits[i, d].item() for d in source.distractors[i])
        for i in range(3)
    ]
    assert measures.logit_margin.from_logits(logits, source).tolist() == pytest.approx(expected)


def test_the_probe_has_the_same_words_in_both_other_turns():
    task = acronyms_task()
    (contrast, *_) = task.contrasts(n=3)
    a, b, c = task.triples["heldout"][0]
    texts = [tuple(text.split()[1:4]) for text in words_of(task, contrast.probe)]
    assert texts == [(b, c, a)] * 3 + [(c, a, b)] * 3


def test_measures_by_letter_average_the_rows_of_each_letter():
    task = acronyms_task()
    both = concatenate([contrast.source for contrast in task.contrasts(n=3)])
    logits = torch.randn(len(both), task.d_vocab, generator=torch.manual_seed(0))
    whole = measures.logit_margin.from_logits(logits, both)
    split = acronyms.by_letter()
    assert list(split) == ["letter 1", "letter 2", "letter 3"]
    for place, measure in enumerate(split.values()):
        found = measure.from_logits(logits, both).mean().item()
        assert found == pytest.approx(whole[place::3].mean().item(), rel=1e-6)


# --- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", ["", "CE", "CEO"])
def test_the_seeds_text_format_is_read_with_or_without_letters(tmp_path, shown):
    path = tmp_path / "acronyms.txt"
    path.write_text(f"The Chief Earth Oil ({shown}, CEO\n\nThe Air Bank City (, ABC\n")
    assert acronyms.read(path) == TRIPLES[:2]


@pytest.mark.parametrize(
    "line",
    [
        "The Chief Earth Oil (, CEX",
        "The Chief Earth (, CE",
        "The Chief Earth Oil, CEO",
        "The Chief Earth Oil (",
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, line):
    path = tmp_path / "acronyms.txt"
    path.write_text(f"The Air Bank City (, ABC\n{line}\n")
    with pytest.raises(PromptError, match=r"acronyms\.txt, line 2: .* is not of the form 'The Chief"):
        acronyms.read(path)


def test_text_prompts_for_a_tokenizer_take_triples_that_were_read():
    tokenizer = WholeWords()
    (first, *_) = found = acronyms.prompts(tokenizer, TRIPLES)
    assert [c.coords["acronym"] for c in found] == ["CEO", "ABC", "DGH", "KLM"]
    assert tokenizer.decode(first.source.tokens[0]) == "The Chief Earth Oil ( C E"
    assert tokenizer.decode(first.base.tokens[0]) == "The Air Bank City ( D G"
    assert len(acronyms.prompts(tokenizer, TRIPLES[:1], "current")) == 3
    assert len(acronyms.prompts(tokenizer)) == 8


def test_a_word_of_several_tokens_is_refused_with_its_prompt():
    with pytest.raises(PromptError, match=r"'The Day Game Hall \(' has 8 tokens, but .* has 7"):
        acronyms.prompts(WholeWords("Game"), [TRIPLES[0], TRIPLES[1], TRIPLES[3], TRIPLES[2]])


def test_all_words_of_too_few_prompts_cannot_be_exchanged():
    with pytest.raises(ValueError, match=r"2 prompts: .* takes three"):
        acronyms.prompts(WholeWords(), TRIPLES[:2])
    with pytest.raises(ValueError, match=r"no corruption 'letters'; there are words, current"):
        acronyms_task().contrasts("letters")


# --- configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_words": 0}, r"task\.n_words is 0; it must be 1\.\.8"),
        ({"n_words": 9}, r"task\.n_words is 9"),
        ({"n_words": 1, "n_prompts": 5325}, r"n_prompts is 5325; it must be 1\.\.5324, half of all triples"),
        ({"order_seed": -1}, r"task\.order_seed"),
    ],
)
def test_an_impossible_config_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        AcronymsConfig(**values)


def test_a_model_too_short_for_the_prompts_is_refused():
    with pytest.raises(ConfigError, match=r"n_ctx is 6; the prompts of this task have 7 tokens"):
        replace(AcronymsRun(), model=ToyConfig(n_ctx=6))


def test_the_source_of_a_row_is_the_letter_it_asks_for():
    task = acronyms_task()
    rows = task.rows("train")
    assert task.sources(rows) == ["letter 1", "letter 2", "letter 3"] * (len(rows) // 3)
    for source, text, target in zip(task.sources(rows), words_of(task, rows), rows.targets, strict=True):
        assert task.vocabulary.decode([target]) == text.split()[int(source[-1])][0]
