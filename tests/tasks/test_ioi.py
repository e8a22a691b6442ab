"""Indirect objects: what the prompts say, which pairs are held out, what corruptions change."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from dynamics.config import ConfigError, IoiConfig, IoiRun, ToyConfig
from dynamics.tasks import PromptError, ioi
from dynamics.tasks.ioi import TEMPLATES, Sentence
from dynamics.tasks.words import NAMES, PLACES, THINGS
from tests.zoo.languages import WholeWords, ioi_task, words_of

SENTENCE = Sentence(0, "Mary", "John", "John", "store", "ring")
NAMED = set(NAMES)


def names_in(text: str) -> list[str]:
    return [word for word in text.split() if word in NAMED]


def answered(task, batch) -> list[str]:
    return [task.vocabulary.decode([token]) for token in batch.targets]


# --- sentences --------------------------------------------------------------------------------------------


def test_a_sentence_reads_as_the_template_says_and_the_one_who_does_not_give_is_the_answer():
    assert SENTENCE.text == "When Mary and John went to the store, John gave a ring to"
    assert (SENTENCE.indirect_object, SENTENCE.order) == ("Mary", "ABBA")
    other = replace(SENTENCE, subject="Mary")
    assert (other.indirect_object, other.order) == ("John", "BABA")


@pytest.mark.parametrize(
    ("corruption", "text"),
    [
        ("subject", "When Mary and John went to the store, Mary gave a ring to"),
        ("order", "When John and Mary went to the store, John gave a ring to"),
        ("names", "When Ann and Eve went to the store, Eve gave a ring to"),
    ],
)
def test_corruptions_by_hand(corruption, text):
    assert ioi.corrupted(SENTENCE, corruption, ["John", "Ann", "Mary", "Eve"]).text == text


def test_other_names_are_two_different_ones_that_the_sentence_does_not_have():
    for n in range(40):
        for names in (NAMES[:5], NAMES[:6], NAMES):
            found = ioi.corrupted(SENTENCE, "names", names, n)
            assert len({found.first, found.second, "Mary", "John"}) == 4
            assert found.order == SENTENCE.order


def test_an_unknown_corruption_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no corruption 'place'; there are subject, order, names"):
        ioi_task().contrasts("place")


def test_every_prompt_has_the_length_the_config_asks_of_the_model():
    task = ioi_task()
    lengths = {
        len(task.vocabulary.encode(replace(s, template=t).text))
        for t in range(len(TEMPLATES))
        for s in task.sentences("trained", 20, "any")
    }
    assert lengths == {IoiRun.length}


# --- rows -------------------------------------------------------------------------------------------------


def test_pairs_are_held_out_whole_and_make_up_all_pairs_with_the_trained_ones():
    pairs = ioi_task(n_names=12, heldout_fraction=0.25).pairs
    held, trained = (set(map(frozenset, pairs[name])) for name in ("heldout", "trained"))
    names = {name for pair in held | trained for name in pair}
    assert len(names) == 12
    assert not held & trained
    assert held | trained == set(map(frozenset, combinations(names, 2)))
    assert len(held) == round(0.25 * 66)


@pytest.mark.slow
def test_no_training_row_has_a_held_out_pair_and_every_evaluated_one_does():
    task = ioi_task(n_prompts=2000)
    held = set(map(frozenset, task.pairs["heldout"]))
    for text in words_of(task, task.rows("learn")):
        assert frozenset(names_in(text)) not in held
    for text in words_of(task, task.evaluation["heldout"]):
        assert frozenset(names_in(text)) in held


def test_the_answer_is_the_name_that_comes_once_and_is_asked_after_the_last_word():
    task = ioi_task()
    rows = task.rows("learn")
    for text, answer in zip(words_of(task, rows), answered(task, rows), strict=True):
        counted = Counter(names_in(text))
        assert sorted(counted.values()) == [1, 2]
        assert counted[answer] == 1
        assert text.endswith(" to")
    assert rows.target_pos.unique().tolist() == [IoiRun.length - 1]


def test_training_has_every_template_both_orders_and_every_trained_pair():
    task = ioi_task(n_prompts=2000)
    drawn = task.sentences("trained", 2000, "prompts")
    assert {s.template for s in drawn} == set(range(len(TEMPLATES)))
    assert {s.place for s in drawn} == set(PLACES)
    assert {s.thing for s in drawn} == set(THINGS)
    counted = Counter(frozenset((s.first, s.second)) for s in drawn)
    assert len(counted) == len(task.pairs["trained"])
    assert max(counted.values()) - min(counted.values()) <= 1
    shares = [
        sum(s.order == "ABBA" for s in drawn) / 2000,
        sum(s.first < s.second for s in drawn) / 2000,
    ]
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    one, same, other = ioi_task(), ioi_task(), ioi_task(seed=1)
    assert torch.equal(one.rows("learn").tokens, same.rows("learn").tokens)
    assert torch.equal(one.batch(7).tokens, same.batch(7).tokens)
    assert one.pairs == same.pairs
    assert one.pairs != other.pairs


def test_the_order_of_rows_has_a_seed_of_its_own():
    one, reordered = ioi_task(), ioi_task(order_seed=5)
    assert torch.equal(one.rows("learn").tokens, reordered.rows("learn").tokens)
    assert not torch.equal(one.batch(0).tokens, reordered.batch(0).tokens)


def test_an_epoch_has_every_row_once():
    task = ioi_task(n_prompts=128)
    batches = [task.batch(step) for step in (0, 1)]
    seen = Counter(text for batch in batches for text in words_of(task, batch))
    assert seen == Counter(words_of(task, task.rows("learn")))


# --- contrasts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", ["subject", "order", "names"])
def test_contrasts_are_of_held_out_pairs_of_equal_length_and_scored_alike(corruption):
    task = ioi_task()
    held = set(map(frozenset, task.pairs["heldout"]))
    for contrast in task.contrasts(corruption, 12):
        base, source = contrast.base, contrast.source
        assert base.tokens.shape == source.tokens.shape == (1, IoiRun.length)
        for field in ("targets", "target_pos", "distractors"):
            assert torch.equal(getattr(base, field), getattr(source, field))
        (text,) = words_of(task, source)
        assert frozenset(names_in(text)) in held
        assert task.vocabulary.decode(source.targets) == contrast.coords["indirect_object"]
        assert task.vocabulary.decode(source.distractors[0]) == contrast.coords["subject"]
        assert Counter(names_in(text))[contrast.coords["subject"]] == 2
        assert not torch.equal(base.tokens, source.tokens)


def test_corrupted_prompts_have_another_answer_the_same_or_none_of_the_two():
    task = ioi_task()

    def answers(contrast) -> tuple[str, set[str]]:
        counted = Counter(names_in(words_of(task, contrast.base)[0]))
        return min(counted, key=counted.get), set(counted)

    for found in task.contrasts("subject", 8):
        assert answers(found)[0] == found.coords["subject"]
    for found in task.contrasts("order", 8):
        assert answers(found)[0] == found.coords["indirect_object"]
    for found in task.contrasts("names", 8):
        assert not answers(found)[1] & {found.coords["indirect_object"], found.coords["subject"]}


def test_the_probe_asks_for_the_same_answer_in_all_other_templates_and_both_orders():
    task = ioi_task()
    for contrast in task.contrasts(n=8):
        texts = words_of(task, contrast.probe)
        assert len(set(texts)) == 2 * (len(TEMPLATES) - 1)
        assert words_of(task, contrast.source)[0] not in texts
        assert contrast.probe.targets.unique().tolist() == contrast.source.targets.tolist()
        assert {tuple(sorted(set(names_in(t)))) for t in texts} == {
            tuple(sorted((contrast.coords["indirect_object"], contrast.coords["subject"])))
        }


# --- text -------------------------------------------------------------------------------------------------


def test_text_prompts_for_a_tokenizer_are_those_of_the_task_read_by_it():
    tokenizer = WholeWords()
    found = ioi.prompts(tokenizer, n=6, prefix="<s>")
    assert len(found) == 6
    for contrast in found:
        text = tokenizer.decode(contrast.source.tokens[0])
        assert text.startswith("<s > ")
        assert tokenizer.decode(contrast.source.targets) == contrast.coords["indirect_object"]
        assert contrast.base.tokens.shape == contrast.source.tokens.shape


def test_an_answer_of_several_tokens_is_refused_with_its_prompt():
    name = ioi.prompts(WholeWords(), n=6)[0].coords["indirect_object"]
    with pytest.raises(
        PromptError, match=rf"' {name}', an answer to '.*', is 2 tokens \[.*\]; it must be one"
    ):
        ioi.prompts(WholeWords(name), n=6)


def test_a_thing_of_several_tokens_makes_a_prompt_longer_and_is_refused_with_it():
    tokenizer = WholeWords()
    texts = [tokenizer.decode(c.source.tokens[0]) for c in ioi.prompts(tokenizer, n=6)]
    counted = Counter(text.split()[-2] for text in texts)
    thing = next(thing for thing in counted if texts[0].split()[-2] != thing)
    with pytest.raises(PromptError, match=rf"' ?.* {thing} to' has 15 tokens, but '.*' has 14"):
        ioi.prompts(WholeWords(thing), n=6)


# --- configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_names": 3}, r"task\.n_names is 3; it must be 6\.\.48"),
        ({"n_names": 49}, r"task\.n_names is 49"),
        ({"heldout_fraction": 0.0}, r"heldout_fraction 0\.0 of 496 pairs"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction 1\.0"),
        ({"n_prompts": 0}, r"n_prompts is 0"),
        ({"name": "facts"}, r"task\.name is 'facts'"),
        ({"seed": -1}, r"task\.seed"),
    ],
)
def test_an_impossible_config_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        IoiConfig(**values)


def test_a_model_too_short_for_the_prompts_is_refused():
    with pytest.raises(ConfigError, match=r"n_ctx is 13; the prompts of this task have 14 tokens"):
        IoiRun(model=ToyConfig(n_ctx=13))


def test_the_source_of_a_row_is_its_order_of_names_and_its_template():
    task = ioi_task()
    rows = task.rows("train")
    sentences = task.sentences("trained", 400, "prompts")
    assert task.sources(rows) == [f"{s.order}, template {s.template}" for s in sentences]
    assert task.sources(rows[5:7]) == task.sources(rows)[5:7]
