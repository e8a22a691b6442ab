"""The single step's map over seeds."""

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory
from scripts.experiments import single_step_map
from tests.scripts.calling import in_small, rows_of


@pytest.mark.slow
def test_recovery_is_a_components_share_of_the_whole_exchange(alias_runs):
    run = Trajectory.open(alias_runs[0])
    task = dy.tasks.load(run.config)
    with in_small(single_step_map, X2_STEPS=(0, 2), PRIMARY=2, N_PLACEBOS=3):
        found = single_step_map.recovered(task, run)
    recipe = task.recipe()
    state = dy.steps.reach(recipe, run, task.config.phases.starts["x2"] + 2, task.batch)
    everything = dy.sites.everything(recipe.model)
    (attention,) = [s for s in dy.sites.components(recipe.model) if s.label == "attn 0"]
    effects = dy.patch_gradients(
        recipe, state, task.contrasts(), [attention, everything], dy.measures.correct_logit
    )["effect"].sum("example")
    expected = float(effects[0] / effects[1])
    assert float(found["recovery"].sel(step=2, optimizer="stored", site="attn 0")) == pytest.approx(
        expected, rel=1e-3
    )
    assert float(found["placebo"].max()) < np.inf
    assert bool((found["placebo"].dropna("site") >= 0).all())


def _fork(value):
    return xr.Dataset(
        {
            "recovery": (("step", "optimizer", "site"), [[[0.0], [0.0]], [[value], [0.0]]]),
            "placebo": ("site", [0.1]),
        },
        {"step": [0, 10], "optimizer": ["fresh", "stored"], "site": ["embed"]},
    )


def test_the_unit_is_the_seed_and_both_halves_of_the_seeds_are_told_apart():
    explored = single_step_map.by_seed({1: [_fork(0.2), _fork(0.4)], 2: [_fork(0.4), _fork(0.6)]})
    confirming = single_step_map.by_seed({3: [_fork(0.7), _fork(0.7)], 4: [_fork(0.9), _fork(0.9)]})
    with in_small(single_step_map, X2_STEPS=(0, 10)):
        (row,) = rows_of("\n".join(single_step_map.table(explored, confirming)))[2:]
    assert row[0] == "embed"
    assert row[1].startswith("+0.40 [")
    assert row[2].startswith("+0.80 [")
    assert row[3] == "no, p = 0.5000"  # of two seeds: an interval of one and a half logits
    assert row[4] == "0.10"


@pytest.mark.parametrize(("explored", "confirming", "said"), [(1, 1, "yes"), (-1, 1, "no"), (-1, -1, "yes")])
def test_a_recovery_holds_on_the_side_that_was_explored(explored, confirming, said):
    first, second = (
        single_step_map.by_seed({n: [_fork(side * v)] * 2 for n, v in enumerate((0.3, 0.4, 0.5))})
        for side in (explored, confirming)
    )
    assert single_step_map.holds(first, second, "embed") == f"{said}, p = 0.2500"


@pytest.mark.slow
def test_both_ways_a_component_brings_as_much_as_it_takes_away_elsewhere(alias_runs):
    run = Trajectory.open(alias_runs[0])
    task = dy.tasks.load(run.config)
    with in_small(single_step_map, PRIMARY=2):
        found = single_step_map.both_ways(task, run)
    recipe = task.recipe()
    state = dy.steps.reach(recipe, run, task.config.phases.starts["x2"] + 2, task.batch)
    (attention,) = [s for s in dy.sites.components(recipe.model) if s.label == "attn 0"]
    one, other = (
        dy.patch_gradients(
            recipe, state.with_fresh_optimizer(), pairs, [attention], dy.measures.correct_logit
        )
        for pairs in (task.contrasts(), [pair.reversed() for pair in task.contrasts()])
    )
    expected = float(one["effect"].mean() - other["effect"].mean()) / 2
    assert float(found["effect"].sel(site="attn 0")) == pytest.approx(expected, abs=1e-4)
    assert float(found["whole"]) == pytest.approx(float((one["source"] - one["base"]).mean()), abs=1e-4)


def test_a_line_says_in_how_many_seeds_a_component_brings_something():
    effect = xr.Dataset(
        {
            "effect": (("seed", "site"), [[0.1], [0.3], [-0.1]]),
            "mixing": (("seed", "site"), [[0.1], [0.1], [0.1]]),
            "whole": ("seed", [1.0, 1.0, 1.0]),
        },
        {"site": ["embed"]},
    )
    first, last = rows_of("\n".join(single_step_map.table_both_ways(effect)))[2:]
    assert first[0] == "embed"
    assert first[1].startswith("+0.10 [")
    assert first[2:] == ["2 of 3", "0.7500", "+0.10 [+0.10, +0.10]"]
    assert last[1] == "+1.00 [+1.00, +1.00]"
