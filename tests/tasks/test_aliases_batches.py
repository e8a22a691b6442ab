"""Batches by step: a pure function of the seeds, the phase and the step."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from dynamics.tasks import load

STARTS = {"pretrain": 0, "x1": 40, "x2": 90, "end": 150}


def rows_of(batch):
    return [
        (*tokens, target)
        for tokens, target in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    ]


def test_a_batch_is_the_same_from_two_tasks_asked_in_opposite_orders(alias_task):
    first, second = alias_task(), alias_task()
    forwards = {step: rows_of(first.batch(step)) for step in range(150)}
    backwards = {step: rows_of(second.batch(step)) for step in reversed(range(150))}
    assert forwards == backwards


def test_a_batch_asked_again_after_others_is_the_same(alias_task):
    task = alias_task(batch_size=64)
    before = rows_of(task.batch(100))
    for step in range(0, 150, 3):
        task.batch(step)
    assert rows_of(task.batch(100)) == before


def test_batches_read_and_move_no_global_generator(alias_task):
    torch.manual_seed(1)
    before = rows_of(alias_task().batch(60))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    alias_task().batch(60)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    torch.manual_seed(2)
    assert rows_of(alias_task().batch(60)) == before


@pytest.mark.parametrize("batch_size", [7, 16, 300])
@pytest.mark.parametrize("phase", ["pretrain", "x1", "x2"])
def test_each_epoch_holds_each_row_of_its_phase_exactly_once(alias_task, phase, batch_size):
    task = alias_task(batch_size=batch_size, definition_copies=2)
    steps = range(STARTS[phase], {"pretrain": 40, "x1": 90, "x2": 150}[phase])
    stream = [row for step in steps for row in rows_of(task.batch(step))]
    expected = Counter(rows_of(task.rows(phase)))
    n_rows = expected.total()
    n_epochs = len(stream) // n_rows
    assert n_epochs >= 2
    epochs = [stream[e * n_rows : (e + 1) * n_rows] for e in range(n_epochs)]
    assert all(Counter(epoch) == expected for epoch in epochs)
    assert all(a != b for a, b in pairwise(epochs))
    assert Counter(stream[n_epochs * n_rows :]) <= expected


@pytest.mark.parametrize("step", [0, 39, 40, 149])
def test_every_batch_has_the_configs_size_and_the_rows_of_its_own_phase(alias_task, step):
    task = alias_task(batch_size=16)
    phase = "pretrain" if step < 40 else "x1" if step < 90 else "x2"
    batch = task.batch(step)
    assert len(batch) == 16
    assert set(rows_of(batch)) <= set(rows_of(task.rows(phase)))
    assert batch.tokens.shape == (16, 4)
    assert batch.target_pos.dtype == batch.targets.dtype == batch.tokens.dtype == torch.int64


def test_a_step_outside_the_run_is_refused(alias_task):
    for step in (-1, 150):
        with pytest.raises(ValueError, match=r"outside the run's steps 0\.\.149"):
            alias_task().batch(step)


def test_phases_of_equal_length_are_shuffled_each_in_its_own_order(alias_task):
    n_rows = len(alias_task().rows("pretrain"))
    n_table = (
        n_rows - 6 * 6 - 2 * 6 * 2
    )  # six aliases: six copies of their definitions, two questions both ways
    task = alias_task(definition_copies=6, table_fraction=n_table / n_rows)
    places = {}
    for phase in ("pretrain", "x1"):
        assert len(task.rows(phase)) == n_rows
        stream = [row for step in range(20) for row in rows_of(task.batch(STARTS[phase] + step))]
        places[phase] = [stream.index(row) for row in rows_of(task.rows(phase))[:n_table]]
    assert places["pretrain"] != places["x1"]


def test_the_order_seed_changes_the_order_alone(alias_task):
    drawn, other = alias_task(seed=0, order_seed=0), alias_task(seed=0, order_seed=1)
    assert drawn.sets == other.sets
    for phase in ("pretrain", "x1", "x2"):
        assert rows_of(drawn.rows(phase)) == rows_of(other.rows(phase))
        assert rows_of(drawn.batch(STARTS[phase])) != rows_of(other.batch(STARTS[phase]))
    assert rows_of(drawn.evaluation["heldout"]) == rows_of(other.evaluation["heldout"])


def test_the_seed_changes_sets_splits_definitions_and_held_out_pairs(alias_task):
    drawn, other = alias_task(seed=0, order_seed=0), alias_task(seed=1, order_seed=0)
    assert drawn.sets != other.sets
    assert drawn.train_multipliers != other.train_multipliers
    assert drawn.false_values != other.false_values
    assert set(rows_of(drawn.evaluation["heldout"])) != set(rows_of(other.evaluation["heldout"]))


def test_study_seeds_0_and_1_give_other_sets_orders_and_weights(alias_task):
    zero, one = alias_task(study_seed=0), alias_task(study_seed=1)
    assert zero.sets != one.sets
    assert rows_of(zero.batch(0)) != rows_of(one.batch(0))
    assert not torch.equal(zero.model().embed.W_E, one.model().embed.W_E)


def test_seed_0_is_a_seed_and_not_an_absent_one(alias_task):
    given, as_study = alias_task(study_seed=5, seed=0, order_seed=0), alias_task(study_seed=0)
    assert given.sets == as_study.sets
    assert rows_of(given.batch(0)) == rows_of(as_study.batch(0))


def test_splits_of_the_table_stand_still_when_other_options_change(alias_task):
    heldout = rows_of(alias_task().evaluation["heldout"])
    for change in (
        {"train_multipliers": 3},
        {"multipliers": (2, 3)},
        {"swap_defs": True},
        {"x2_keeps_x1": False},
    ):
        task = alias_task(**change)
        assert rows_of(task.evaluation["heldout"]) == heldout
        assert task.sets == alias_task().sets


def test_a_task_loaded_from_its_configs_plain_data_gives_the_same_batches(alias_task):
    task = alias_task(study_seed=3)
    again = load(task.config.to_dict())
    assert again.config == task.config
    assert all(rows_of(again.batch(step)) == rows_of(task.batch(step)) for step in (0, 41, 95))


@pytest.mark.slow
def test_the_recipes_optimizer_takes_the_configs_learning_rate_at_every_step(alias_task):
    recipe = alias_task().recipe()
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    scheduler = recipe.scheduler(optimizer)
    assert (optimizer.defaults["betas"], optimizer.defaults["weight_decay"]) == ((0.9, 0.98), 0.3)
    assert recipe.clip.max_norm == 1.0
    optimizer.step()  # torch wants it before the scheduler's
    for _ in range(3):
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3]
        scheduler.step()


def test_the_batches_of_a_stretch_are_made_when_they_are_asked_for(alias_task):
    task = alias_task()
    batches = task.batches(40, 50)
    assert len(batches) == 10
    assert [torch.equal(b.tokens, task.batch(40 + i).tokens) for i, b in enumerate(batches)] == [True] * 10
    later = batches[7:]
    assert len(later) == 3
    assert torch.equal(later[0].tokens, task.batch(47).tokens)
    with pytest.raises(IndexError):
        later[3]
