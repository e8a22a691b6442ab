"""Sweeps over pairs of checkpoints: a grid of base steps and source steps."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from checkpoints import CheckpointPair
from dynamics import measures, sites, steps, sweeps, tasks
from dynamics.sweeps import SweepError
from tests.zoo.sweep_runs import alone, lines

BASES, SOURCES = [4, 9], [0, 11]
"""9 and 11 lie between stored checkpoints."""


def swept(verb, run, **settings) -> xr.Dataset:
    given = {"source_steps": SOURCES, **settings}
    return dy.sweep(verb, run, given.pop("steps", BASES), alone, sites.heads, measures.correct_logit, **given)


def patched_activations(recipe, pair, contrasts, sites, measure) -> xr.Dataset:
    where = dy.sites.activations(recipe.model, "blocks.*.hook_resid_pre")
    return dy.patch_activations(recipe, pair, contrasts, where, measure)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [dy.patch_parameters, dy.attribute_parameters, patched_activations])
def test_every_cell_of_the_grid_is_what_the_verb_itself_gives_of_that_pair(run, verb):
    task = tasks.load(run.config)
    recipe = task.recipe()
    found = swept(verb, run)
    assert found["base"].dims == ("step", "source_step", "example")
    for base in BASES:
        for source in SOURCES:
            states = (steps.reach(recipe, run, step, task.batch) for step in (base, source))
            pair = CheckpointPair(*states)
            by_hand = verb(recipe, pair, task.contrasts(), sites.heads(recipe.model), measures.correct_logit)
            cell = found.sel(step=base, source_step=source).drop_vars(["step", "source_step"])
            xr.testing.assert_equal(cell, by_hand)


def stopping(recipe, pair, contrasts, sites, measure, calls: Path, after: int | None = None) -> xr.Dataset:
    """A verb that counts its calls, and is interrupted after some, once."""
    stopped = calls.with_name("stopped")
    if lines(calls) == after and not stopped.exists():
        stopped.touch()
        raise KeyboardInterrupt
    with calls.open("a") as file:
        file.write(f"{pair.source.step} into {pair.base.step}\n")
    return dy.patch_parameters(recipe, pair, contrasts, sites, measure)


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
def test_a_sweep_that_is_stopped_in_the_middle_goes_on_and_equals_one_that_was_not(run, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "kept"
    verb, bases = partial(stopping, calls=calls, after=5), [4, 6]
    with pytest.raises(KeyboardInterrupt):
        swept(verb, run, steps=bases, source_steps=[0, 12], out=out)
    assert len(list((out / "shards").iterdir())) == lines(calls) == 5
    found = swept(verb, run, steps=bases, source_steps=[0, 12], out=out)
    assert lines(calls) == 4 * 2 * 2
    xr.testing.assert_identical(found, swept(verb, run, steps=bases, source_steps=[0, 12]))
    (said,) = out.glob("*.json")
    written = json.loads(said.read_text())
    assert (written["steps"], written["source_steps"]) == (bases, [0, 12])
    kept = {(shard["step"], shard["source_step"]) for shard in written["shards"].values()}
    assert kept == {(4, 0), (4, 12), (6, 0), (6, 12)}


@pytest.mark.slow
def test_further_source_steps_use_what_is_there_and_other_pairs_do_not(run, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "kept"
    verb = partial(stopping, calls=calls)
    swept(verb, run, steps=4, source_steps=[0], out=out)
    swept(verb, run, steps=[4], source_steps=[0, 12], out=out)
    assert calls.read_text().splitlines() == ["0 into 4", "12 into 4"]
    swept(verb, run, steps=12, source_steps=4, out=out)
    assert calls.read_text().splitlines()[2:] == ["4 into 12"]


def test_one_source_step_makes_no_dim(run):
    found = swept(dy.patch_parameters, run, steps=4, source_steps=12)
    assert found["effect"].dims == ("example", "site")
    assert found.equals(swept(dy.patch_parameters, run, steps=[4], source_steps=[12]).squeeze(drop=True))


@pytest.mark.slow
def test_a_checkpoint_put_into_itself_does_nothing(run):
    found = swept(dy.patch_parameters, run, steps=[4, 6], source_steps=[4, 6])
    for step in (4, 6):
        assert (found["effect"].sel(step=step, source_step=step) == 0).all()
    assert np.abs(found["effect"].sel(step=4, source_step=6)).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_steps": []}, "was given no source_steps"),
        ({"source_steps": [4, 13]}, "step 13 is not a step of"),
        ({"source_steps": [4, 4]}, "source step 4 more than once"),
    ],
)
def test_source_steps_that_cannot_be_are_refused(run, changes, message):
    with pytest.raises(SweepError, match=message):
        swept(dy.patch_parameters, run, **changes)


def test_an_error_names_both_steps(run):
    def failing(*arguments):
        raise ArithmeticError

    with pytest.raises(ArithmeticError) as caught:
        swept(failing, run)
    assert caught.value.__notes__ == [f"This was at step 0 into 4 of {run.path}."]


def test_an_estimate_counts_every_pair(run):
    arguments = dy.patch_parameters, run, [4, 6], alone, sites.heads, measures.correct_logit
    said = sweeps.estimate(sweeps.plan(*arguments, source_steps=[0, 2, 12]))
    assert said.replays == 2 * 3 * 4 * 2
    assert 0 < said.seconds < 60


@pytest.mark.slow
def test_source_checkpoints_may_be_of_another_run(runs):
    run, other = runs
    task = tasks.load(other.config)
    found = swept(dy.patch_parameters, run, steps=[4], source_steps=SOURCES, source_run=other)
    own = swept(dy.patch_parameters, run, steps=[4], source_steps=SOURCES)
    assert not found["source"].equals(own["source"])
    recipe = tasks.load(run.config).recipe()
    for source in SOURCES:
        pair = CheckpointPair(run.at(4), steps.reach(task.recipe(), other, source, task.batch))
        contrasts = tasks.load(run.config).contrasts()
        by_hand = dy.patch_parameters(
            recipe, pair, contrasts, sites.heads(recipe.model), measures.correct_logit
        )
        cell = found.sel(step=4, source_step=source).drop_vars(["step", "source_step"])
        xr.testing.assert_equal(cell, by_hand)
    assert json.loads(found.attrs["provenance"])["source_run"] == str(other.path.resolve())


@pytest.mark.slow
def test_what_is_kept_of_one_source_run_answers_for_no_other_and_for_itself_wherever_it_lies(runs, tmp_path):
    run, other = runs
    moved = dy.Trajectory.open(shutil.copytree(other.path, tmp_path / "moved"))
    calls, out = tmp_path / "calls", tmp_path / "kept"
    verb = partial(stopping, calls=calls)
    ask = partial(swept, verb, run, steps=4, source_steps=6, out=out)
    ask()
    ask(source_run=other)
    assert lines(calls) == 2
    ask(source_run=moved)
    ask()
    assert lines(calls) == 2


def test_a_source_run_without_source_steps_is_refused(run):
    with pytest.raises(SweepError, match="source_run without source_steps"):
        swept(dy.patch_parameters, run, source_steps=None, source_run=run)
