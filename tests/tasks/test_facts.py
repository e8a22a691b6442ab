"""Facts: which statements are trained when, how a late fact is written, what corruptions change."""

from collections import Counter

import numpy as np
import pytest
import torch

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.config import ConfigError, FactsConfig, FactsRun, ToyConfig
from dynamics.tasks import PromptError, facts
from dynamics.tasks.facts import RELATIONS, TEMPLATES, Fact
from dynamics.tasks.words import COUNTRIES, FILLERS
from tests.zoo.languages import WholeWords, facts_task, words_of

SPAIN = Fact("Spain", "capital")


def said(task, batch) -> Counter[str]:
    """Each row with its answer, counted."""
    answers = (task.vocabulary.decode([target]) for target in batch.targets)
    return Counter(f"{text} {answer}" for text, answer in zip(words_of(task, batch), answers, strict=True))


def spoken(task, fact, template) -> str:
    """As `said` has it."""
    return task.vocabulary.decode(task.vocabulary.encode(f"{fact.said(template)} {fact.answer}"))


# --- what is true -----------------------------------------------------------------------------------------


def test_facts_by_hand():
    assert SPAIN.answer == "Madrid"
    assert Fact("Spain", "language").answer == "Spanish"
    assert Fact("Peru", "continent").answer == "America"
    assert [SPAIN.said(t) for t in range(4)] == [
        "The capital of Spain is",
        "In Spain the capital is",
        "As capital, Spain has",
        "Ask Spain its capital:",
    ]
    assert SPAIN.said(0, "fox") == "The capital of fox is"


def test_every_country_has_one_word_for_each_relation_and_capitals_are_all_different():
    assert len(COUNTRIES) == 44
    assert {len(answers) for answers in COUNTRIES.values()} == {len(RELATIONS)}
    capitals = [capital for capital, _, _ in COUNTRIES.values()]
    assert len(set(capitals)) == 44
    assert not set(capitals) & set(COUNTRIES)


def test_every_prompt_has_the_length_the_config_asks_of_the_model():
    task = facts_task()
    fact = task.known[0]
    assert {len(task.vocabulary.encode(fact.said(t))) for t in range(len(TEMPLATES))} == {FactsRun.length}


# --- rows -------------------------------------------------------------------------------------------------


def test_known_and_late_facts_are_all_facts_and_late_ones_are_capitals():
    task = facts_task()
    everything = {Fact(subject, relation) for subject in task.subjects for relation in RELATIONS}
    assert set(task.known) | set(task.late) == everything
    assert len(task.known) + len(task.late) == len(everything) == 36
    assert {fact.relation for fact in task.late} == {"capital"}
    assert len(task.late) == 3


@pytest.mark.parametrize("late_templates", [1, 3])
def test_a_fact_is_questioned_in_the_templates_it_is_not_trained_in(late_templates):
    task = facts_task(late_templates=late_templates)
    for fact in (*task.known, *task.late):
        trained, questioned = task.templates(fact)
        assert sorted((*trained, *questioned)) == [0, 1, 2, 3]
        assert len(trained) == (late_templates if fact in task.late else 3)
    assert len({task.templates(fact)[1] for fact in task.known}) == 4  # not the same one for all


def test_no_late_fact_is_stated_before_its_phase_and_then_as_often_as_asked():
    task = facts_task(late_copies=2)
    before, after = (said(task, task.rows(phase)) for phase in ("learn", "late"))
    assert before == Counter(spoken(task, f, t) for f in task.known for t in task.templates(f)[0])
    stated = Counter(
        {spoken(task, fact, template): 2 for fact in task.late for template in task.templates(fact)[0]}
    )
    assert after == before + stated


def test_questions_are_never_trained():
    task = facts_task()
    trained = said(task, task.rows("late"))
    assert not trained & said(task, task.evaluation["heldout"])
    assert not trained & said(task, task.evaluation["late"])
    assert said(task, task.evaluation["late_stated"]).keys() < trained.keys()


def test_the_same_seed_gives_the_same_facts_and_another_seed_others():
    one, same, other = facts_task(), facts_task(), facts_task(seed=1)
    assert one.late == same.late != other.late
    assert torch.equal(one.batch(650).tokens, same.batch(650).tokens)


# --- contrasts --------------------------------------------------------------------------------------------


def test_a_contrast_of_subjects_has_another_answer_in_the_same_template():
    task = facts_task()
    found = task.contrasts()
    assert [c.coords["subject"] for c in found] == [f.subject for f in task.known if f.relation == "capital"]
    for contrast in found:
        fact = Fact(contrast.coords["subject"], contrast.coords["relation"])
        template = contrast.coords["template"]
        assert (template,) == task.templates(fact)[1]
        clean, corrupted = (words_of(task, side)[0] for side in (contrast.source, contrast.base))
        wrong = task.vocabulary.decode(contrast.base.distractors[0])
        (other,) = [s for s in task.subjects if COUNTRIES[s][0] == wrong]
        assert clean.replace(fact.subject, other) == corrupted != clean
        assert task.vocabulary.decode(contrast.base.targets) == fact.answer != wrong
        assert torch.equal(contrast.base.targets, contrast.source.targets)
        assert contrast.coords["late"] == 0
        rest = [f for t, f in enumerate(map(fact.said, range(4))) if t != template]
        assert words_of(task, contrast.probe) == [
            task.vocabulary.decode(task.vocabulary.encode(text)) for text in rest
        ]


def test_a_contrast_of_words_has_one_that_says_nothing_in_the_subjects_place():
    task = facts_task()
    for contrast in task.contrasts("words"):
        clean, corrupted = (words_of(task, side)[0].split() for side in (contrast.source, contrast.base))
        changed = [(a, b) for a, b in zip(clean, corrupted, strict=True) if a != b]
        assert len(changed) == 1
        assert changed[0][0] == contrast.coords["subject"]
        assert changed[0][1] in FILLERS


def test_contrasts_of_chosen_facts_and_of_late_ones():
    task = facts_task()
    found = task.contrasts(facts=task.late)
    assert [c.coords["late"] for c in found] == [1, 1, 1]
    assert [c.coords["template"] for c in found] == [task.templates(f)[1][0] for f in task.late]
    with pytest.raises(ValueError, match=r"no corruption 'order'; there are subject, words"):
        task.contrasts("order")


def test_subjects_that_share_every_answer_cannot_be_exchanged():
    chosen = [Fact(subject, "continent") for subject in ("Spain", "France")]
    with pytest.raises(ValueError, match=r"has the continent Europe; give others"):
        facts.prompts(WholeWords(), chosen)


# --- a fact being written ---------------------------------------------------------------------------------


def test_a_statement_is_the_late_fact_against_another_one_and_is_measured_elsewhere():
    task = facts_task()
    for fact, contrast in zip(task.late, task.statements(), strict=True):
        stated, questioned = task.templates(fact)
        assert said(task, contrast.source) == Counter([spoken(task, fact, stated[0])])
        (base,) = said(task, contrast.base)
        neutral = next(f for f in task.known if base == spoken(task, f, stated[0]))
        assert said(task, contrast.probe) == Counter(spoken(task, fact, t) for t in questioned)
        wrong = {task.vocabulary.decode(row) for row in contrast.probe.distractors}
        assert wrong == {neutral.answer}


def test_statements_in_a_real_batch_stand_where_training_had_them():
    task = facts_task()
    step = task.config.phases.starts["late"] + 3
    batch = task.batch(step)
    drawn = said(task, batch)
    found = task.statements_at(step)
    assert len({c.coords["example"] for c in found}) == len(task.late)
    for fact, contrast in zip(task.late, found, strict=True):
        own = spoken(task, fact, task.templates(fact)[0][0])
        assert contrast.coords["in_batch"] == int(own in drawn)
        differ = (contrast.base.tokens != contrast.source.tokens).any(-1)
        assert own not in said(task, contrast.base)
        assert len(contrast.base) == len(contrast.source) == len(batch)
        if own in drawn:
            assert torch.equal(contrast.source.tokens, batch.tokens)
            assert int(differ.sum()) == drawn[own]
        else:
            assert differ.nonzero().tolist() == [[0]]
            assert said(task, contrast.source)[own] == 1
        same = ~differ
        assert torch.equal(contrast.base.tokens[same], batch.tokens[same])
        assert torch.equal(contrast.base.targets[same], batch.targets[same])


def test_some_step_of_the_late_phase_has_a_late_fact_and_none_before_it():
    task = facts_task()
    late = task.config.phases.starts["late"]
    assert {c.coords["in_batch"] for step in range(3) for c in task.statements_at(step)} == {0}
    assert {c.coords["in_batch"] for step in range(late, late + 4) for c in task.statements_at(step)} >= {1}


def test_the_step_that_states_a_late_fact_can_be_patched_and_writes_it():
    task = facts_task()
    recipe = task.recipe()
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    step = task.config.phases.starts["late"]
    start = Checkpoint.capture(recipe.model, optimizer, recipe.build_scheduler(optimizer), step)
    found = dy.patch_gradients(
        recipe,
        start,
        task.statements_at(step),
        [dy.sites.everything(recipe.model)],
        dy.measures.correct_log_prob,
    )
    whole = (found["source"] - found["base"]).values
    np.testing.assert_allclose(found["effect"].isel(site=0).values, whole, rtol=1e-5, atol=1e-6)
    assert (whole > 0).all()  # stating it makes it likelier in templates it was not stated in


# --- text -------------------------------------------------------------------------------------------------


def test_text_prompts_for_a_tokenizer_are_read_in_one_template():
    tokenizer = WholeWords()
    found = facts.prompts(tokenizer, template=1)
    assert len(found) == 8
    assert tokenizer.decode(found[1].source.tokens[0]) == "In Spain the capital is"
    assert tokenizer.decode(found[1].source.targets) == "Madrid"
    assert tokenizer.decode(found[1].base.tokens[0]) == "In Italy the capital is"
    begun = facts.prompts(tokenizer, prefix="Well")
    assert all(tokenizer.decode(c.source.tokens[0]).startswith("Well") for c in begun)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("Madrid", r"' Madrid', an answer to 'The capital of .* is', is 2 tokens"),
        ("Spain", r"'The capital of .*' has \d tokens, but 'The capital of .*' has \d"),
    ],
)
def test_a_word_of_several_tokens_is_refused_with_its_prompt(broken, message):
    with pytest.raises(PromptError, match=message):
        facts.prompts(WholeWords(broken))


# --- configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_subjects": 3}, r"task\.n_subjects is 3; it must be 4\.\.44"),
        ({"n_subjects": 10, "n_late": 9}, r"task\.n_late is 9; it must be 1\.\.8"),
        ({"n_late": 0}, r"task\.n_late is 0"),
        ({"late_templates": 4}, r"task\.late_templates is 4; it must be 1\.\.3"),
        ({"late_copies": 0}, r"task\.late_copies is 0"),
    ],
)
def test_an_impossible_config_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        FactsConfig(**values)


def test_a_model_too_short_for_the_prompts_is_refused():
    with pytest.raises(ConfigError, match=r"n_ctx is 4; the prompts of this task have 5 tokens"):
        FactsRun(model=ToyConfig(n_ctx=4))


def test_the_source_of_a_row_is_the_fact_that_it_states():
    task = facts_task()
    rows = task.rows("late")
    answers = {f"{fact.relation} of {fact.subject}": fact.answer for fact in (*task.known, *task.late)}
    sources = task.sources(rows)
    assert set(sources) == set(answers)
    for source, text, target in zip(sources, words_of(task, rows), rows.targets, strict=True):
        relation, _, subject = source.partition(" of ")
        assert relation in text
        assert subject in text
        assert task.vocabulary.decode([target]) == answers[source]
