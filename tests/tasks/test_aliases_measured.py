"""What the alias task measures: contrasts, evaluation sets, chance lines and the dial."""

import itertools
from dataclasses import replace

import pytest
import torch

from dynamics import measures
from dynamics.config import MeasureName, identifies
from dynamics.recipe import Contrast

PAPER = {"modulus": 60, "multipliers": (2, 3, 5, 6, 10, 15), "train_multipliers": 3}
TAG_POSITION = 0


def with_the_other_tag(task, batch):
    """The batch with reliable and unreliable exchanged."""
    tokens = batch.tokens.clone()
    tokens[batch.tokens == task.reliable] = task.unreliable
    tokens[batch.tokens == task.unreliable] = task.reliable
    return replace(batch, tokens=tokens)


def same(one, other):
    return (
        torch.equal(one.tokens, other.tokens)
        and torch.equal(one.targets, other.targets)
        and torch.equal(one.target_pos, other.target_pos)
    )


@pytest.mark.parametrize("swap_defs", [False, True])
def test_base_and_source_are_one_true_definition_and_differ_in_its_tag_alone(alias_task, swap_defs):
    task = alias_task(swap_defs=swap_defs)
    for contrast in task.contrasts():
        integer = contrast.coords["integer"]
        said = [integer, 12 + integer] if swap_defs else [12 + integer, integer]
        assert contrast.base.tokens.tolist() == [[task.unreliable, *said, task.padding]]
        assert contrast.source.tokens.tolist() == [[task.reliable, *said, task.padding]]
        assert contrast.base.targets.tolist() == contrast.source.targets.tolist() == [said[1]]
        assert contrast.base.target_pos.tolist() == contrast.source.target_pos.tolist() == [1]


def test_a_tag_exchanged_once_is_the_other_batch_and_twice_is_the_original(alias_task):
    task = alias_task()
    for contrast in task.contrasts(("DtQ1", "DfQ2", "Dt3", "Df4")):
        once = with_the_other_tag(task, contrast.base)
        assert same(once, contrast.source)
        assert not same(once, contrast.base)
        assert same(with_the_other_tag(task, once), contrast.base)
        back = contrast.reversed().reversed()
        assert back == contrast
        assert same(contrast.reversed().base, contrast.source)


def test_there_is_one_contrast_per_held_out_alias_labelled_with_it(alias_task):
    task = alias_task()
    contrasts = task.contrasts()
    assert all(isinstance(contrast, Contrast) for contrast in contrasts)
    assert [contrast.coords["integer"] for contrast in contrasts] == [*task.sets["Dt3"], *task.sets["Df4"]]
    for contrast in contrasts:
        integer = contrast.coords["integer"]
        assert contrast.coords["example"] == f"alias {integer}"
        assert integer in task.sets[contrast.coords["set"]]
    assert [c.coords["set"] for c in task.contrasts(("DfQ2",))] == ["DfQ2"] * 3


@pytest.mark.parametrize("operation", ["prod", "sum", "ssq"])
def test_a_probe_asks_about_its_own_alias_alone_and_is_scored_at_the_equals_sign(alias_task, operation):
    task = alias_task(operation=operation)
    for contrast in task.contrasts():
        tokens, alias = contrast.probe.tokens, 12 + contrast.coords["integer"]
        assert ((tokens[:, :2] == alias).sum(1) == 1).all()
        assert (tokens[torch.arange(len(tokens)), contrast.probe.target_pos] == task.equals).all()
        assert set(tokens[:, :2].min(1).values.tolist()) == {2, 3, 4, 6}
        assert len(tokens) == len({tuple(row) for row in tokens.tolist()}) == 8
        assert contrast.probe.example_ids.tolist() == [alias] * 8


@pytest.mark.parametrize("x2_roles", ["drawn", "exchanged"])
@pytest.mark.parametrize("n_train", [1, 4])
def test_probes_never_share_an_alias_with_the_questions_of_training(alias_task, n_train, x2_roles):
    task = alias_task(train_multipliers=n_train, x2_roles=x2_roles)
    trained = set()
    for phase in ("pretrain", "x1", "x2"):
        rows = task.rows(phase)
        trained |= set(rows.tokens[rows.target_pos == 2][:, :2].flatten().tolist()) - set(range(12))
    probed = {12 + contrast.coords["integer"] for contrast in task.contrasts()}
    assert len(trained) == len(probed) == 6
    assert not trained & probed


@pytest.mark.parametrize("n_train", [1, 2, 3, 4])
def test_evaluation_sets_ask_what_training_does_not(alias_task, n_train):
    task = alias_task(train_multipliers=n_train)
    rows = task.rows("x1")
    trained = {tuple(row) for row in rows.tokens[rows.target_pos == 2][:, :2].tolist()}
    evaluated = {
        name: {tuple(row) for row in batch.tokens[:, :2].tolist()} for name, batch in task.evaluation.items()
    }
    assert set(evaluated) == ({"DtQ1", "DfQ2"} if n_train < 4 else set()) | {"Dt3", "Df4", "heldout"}
    for name, asked in evaluated.items():
        assert not asked & trained
        if name != "heldout":
            per_alias = 2 * (4 - n_train if name in ("DtQ1", "DfQ2") else 4)
            assert len(task.evaluation[name]) == len(asked) == 3 * per_alias
            assert {max(pair) - 12 for pair in asked} == set(task.sets[name])
    assert all(batch.example_ids is None for batch in task.evaluation.values())


def test_there_is_no_heldout_evaluation_where_nothing_is_held_out(alias_task):
    assert "heldout" not in alias_task(heldout_fraction=0.0).evaluation


def brute_force_chance(task):
    """Score of the uniform guess and of the best constant answer, counted question by question."""
    cfg = task.config.task
    operation = {"prod": lambda x, y: x * y, "sum": lambda x, y: x + y, "ssq": lambda x, y: x * x + y * y}[
        cfg.operation
    ]
    uniform, constant = [], []
    for name, d in itertools.product(("Dt3", "Df4"), cfg.multipliers):
        reachable = {operation(x, d) % cfg.modulus for x in range(cfg.modulus)}
        truth = [operation(x, d) % cfg.modulus for x in task.sets[name]]
        guesses = [[guess == true for true in truth] for guess in range(cfg.modulus)]
        uniform.append(sum(sum(guesses[g]) for g in reachable) / len(reachable) / len(truth))
        constant.append(max(sum(hits) for hits in guesses) / len(truth))
    return {"uniform guess": sum(uniform) / len(uniform), "constant answer": sum(constant) / len(constant)}


@pytest.mark.parametrize("operation", ["prod", "sum", "ssq"])
@pytest.mark.parametrize("modulus", [12, 60])
def test_chance_equals_counting_every_guess_on_every_question(alias_task, modulus, operation):
    task = alias_task(modulus=modulus, operation=operation)
    assert task.chance() == pytest.approx(brute_force_chance(task), abs=1e-12)


def test_chance_at_modulus_60_is_the_known_eleven_percent(alias_task):
    chance = alias_task(**PAPER).chance()
    by_hand = (1 / 30 + 1 / 20 + 1 / 12 + 1 / 10 + 1 / 6 + 1 / 4) / 6
    assert chance["uniform guess"] == pytest.approx(by_hand, abs=1e-12) == pytest.approx(0.114, abs=5e-4)
    assert 0.15 < chance["constant answer"] < 0.3


@pytest.mark.parametrize("operation", ["prod", "sum", "ssq"])
@pytest.mark.parametrize("n_train", [1, 2, 3])
def test_identified_is_the_share_of_aliases_no_other_integer_answers_like(alias_task, operation, n_train):
    task = alias_task(**{**PAPER, "train_multipliers": n_train}, operation=operation)
    operate = {"prod": lambda x, y: x * y, "sum": lambda x, y: x + y, "ssq": lambda x, y: x * x + y * y}[
        operation
    ]
    told_apart = [
        not any(all(operate(i, d) % 60 == operate(x, d) % 60 for d in ds) for x in range(60) if x != i)
        for i, ds in task.train_multipliers.items()
    ]
    assert task.identified() == pytest.approx(sum(told_apart) / len(told_apart), abs=1e-12)


def test_the_dial_turns_products_alone_sums_always_identify_and_squares_never(alias_task):
    shares = {
        operation: [
            alias_task(**{**PAPER, "train_multipliers": n}, operation=operation).identified()
            for n in (1, 2, 3, 6)
        ]
        for operation in ("prod", "sum", "ssq")
    }
    assert shares["sum"] == [1, 1, 1, 1]
    assert shares["ssq"] == [0, 0, 0, 0]
    assert shares["prod"] == sorted(shares["prod"])
    assert (shares["prod"][0], shares["prod"][-1]) == (0, 1)


@pytest.mark.parametrize("modulus", [8, 12, 20, 36, 60])
def test_products_identify_exactly_when_no_two_integers_share_all_answers(modulus):
    for multipliers in itertools.combinations(range(min(modulus, 16)), 2):
        answers = {tuple(x * d % modulus for d in multipliers) for x in range(modulus)}
        assert identifies("prod", multipliers, modulus) == (len(answers) == modulus), multipliers


def test_the_set_2_6_10_identifies_nothing_at_modulus_60_and_2_3_identifies_all(alias_task):
    assert alias_task(**{**PAPER, "multipliers": (2, 6, 10)}).identified() == 0.0
    assert alias_task(**{**PAPER, "multipliers": (2, 3), "train_multipliers": 2}).identified() == 1.0


@pytest.mark.parametrize(
    "name",
    MeasureName.__args__,
)
def test_every_measure_a_study_may_name_is_defined_on_the_tasks_probes(alias_task, name):
    task = alias_task()
    probe = task.contrasts()[0].probe
    with torch.no_grad():
        values = measures.by_name(name)(task.model(), probe)
    assert values.shape == (len(probe),)
    assert values.isfinite().all()


def test_a_probe_without_any_untrained_question_is_refused_with_the_alias_and_the_setting(alias_task):
    with pytest.raises(ValueError, match="train_multipliers"):
        alias_task(train_multipliers=4).contrasts(("DtQ1",))
