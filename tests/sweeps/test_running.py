"""What a sweep computes, who computes it, what is refused and foretold."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryError, TrajectoryWriter
from dynamics import measures, results, sites, steps, sweeps, tasks
from dynamics.attribution import attribute_step
from dynamics.config import (
    StudyConfig,
)
from dynamics.patching import (
    both_directions,
    interactions,
    patch_gradients,
    patch_updates,
    patch_window,
)
from dynamics.recipe import Contrast, Recipe
from dynamics.sweeps import SweepError, planning, units
from dynamics.tasks import AliasTask
from tests.zoo.sweep_runs import (
    STEPS,
    alone,
    counted,
    lines,
    patch_signals_at,
    swept,
    trained,
)


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    "verb",
    [
        patch_gradients,
        partial(both_directions, patch_updates),
        partial(patch_signals_at, forward="source"),
        interactions,
        attribute_step,
    ],
    ids=lambda verb: units.in_words(verb),
)
def test_every_step_is_what_the_verb_itself_gives_there(run, verb):
    task = tasks.load(run.config)
    recipe = task.recipe()
    found = swept(verb, run)
    for step in STEPS:
        state = steps.reach(recipe, run, step, task.batch)
        by_hand = verb(recipe, state, task.contrasts(), sites.heads(recipe.model), measures.correct_logit)
        xr.testing.assert_equal(found.sel(step=step).drop_vars("step"), by_hand)


@pytest.mark.slow
def test_lists_of_contrasts_and_sites_do_as_well_as_functions(run):
    task = tasks.load(run.config)
    listed = dy.sweep(
        patch_gradients, run, STEPS, task.contrasts(), sites.heads(task.model()), measures.correct_logit
    )
    xr.testing.assert_identical(listed, swept(patch_gradients, run))


@pytest.mark.slow
def test_a_single_step_makes_no_dim_and_a_verbs_own_dim_step_then_stays(run):
    assert "step" not in swept(patch_gradients, run, 8).dims
    window = dy.sweep(
        partial(patch_window, measured_after=[1, 2]),
        run,
        9,
        lambda task, step: task.impulses(step, 2),
        sites.heads,
        measures.correct_logit,
    )
    assert window["step"].values.tolist() == [10, 11]
    with pytest.raises(
        SweepError, match=r"patch_window\(measured_after=\[1, 2\]\) has a dim 'step' of its own"
    ):
        dy.sweep(
            partial(patch_window, measured_after=[1, 2]),
            run,
            [8, 9],
            lambda task, step: task.impulses(step, 2),
            sites.heads,
            measures.correct_logit,
        )


@pytest.mark.slow
def test_contrasts_may_depend_on_the_step(run):
    found = dy.sweep(patch_gradients, run, STEPS, AliasTask.contrasts_at, sites.heads, measures.correct_logit)
    task = tasks.load(run.config)
    expected = [[c.coords["in_batch"] for c in task.contrasts_at(step)] for step in STEPS]
    assert found["in_batch"].broadcast_like(found["base"]).transpose("step", ...).values.tolist() == expected


@pytest.mark.slow
def test_several_states_make_a_dim_optimizer_and_one_makes_none(run):
    states = {"stored": planning.as_stored, "fresh": Checkpoint.with_fresh_optimizer}
    both = swept(patch_gradients, run, state=states)
    assert both["effect"].dims == ("optimizer", "step", "example", "site")
    for name, state in states.items():
        xr.testing.assert_equal(
            both.sel(optimizer=name).drop_vars("optimizer"), swept(patch_gradients, run, state=state)
        )
    assert not both["effect"].sel(optimizer="stored").equals(both["effect"].sel(optimizer="fresh"))


@pytest.mark.slow
def test_runs_make_a_dim_seed_and_examples_keep_their_own_names_as_labels(runs):
    found = swept(patch_gradients, runs)
    assert found["effect"].dims == ("seed", "step", "example", "site")
    assert found["seed"].values.tolist() == [0, 1]
    assert found["example"].values.tolist() == [f"example {i}" for i in range(4)]
    for seed, run in enumerate(runs):
        own = swept(patch_gradients, run)
        assert found["label"].sel(seed=seed).values.tolist() == own["example"].values.tolist()
        assert (found["effect"].sel(seed=seed).values == own["effect"].values).all()
        assert found["integer"].sel(seed=seed).values.tolist() == own["integer"].values.tolist()
    assert found["set"].dims == ("example",)
    assert {"p", "recovery"} <= set(dy.statistics.summarize(found).data_vars)


def test_runs_named_by_the_user_keep_their_names(runs):
    found = swept(patch_gradients, {"drawn": runs[0], "again": runs[0]}, 8)
    assert found["seed"].values.tolist() == ["drawn", "again"]
    assert found["example"].values.tolist() == swept(patch_gradients, runs[0], 8)["example"].values.tolist()


def test_examples_that_lack_a_coordinate_are_labelled_as_the_verb_would(run, small_units):
    task = tasks.load(run.config)
    given = [replace(c, coords={"rank": 3} if i == 2 else {}) for i, c in enumerate(task.contrasts())]
    where = sites.heads(task.model())
    found = dy.sweep(patch_gradients, run, 8, given, where, measures.correct_logit)
    by_hand = patch_gradients(task.recipe(), run.at(8), given, where, measures.correct_logit)
    xr.testing.assert_equal(found, by_hand)
    assert found["rank"].values.tolist() == [-1, -1, 3, -1]


class Watched(AliasTask):
    """A task that leaves word of every batch it is asked for."""

    def __init__(self, run: Trajectory, calls: Path) -> None:
        super().__init__(StudyConfig.from_dict(run.config))
        self.calls = calls

    def batch(self, step: int) -> Any:
        with self.calls.open("a") as file:
            file.write(f"{step}\n")
        return super().batch(step)


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
def test_a_checkpoint_is_reached_once_for_all_its_units_and_states(run, tmp_path):
    states = {"stored": planning.as_stored, "fresh": Checkpoint.with_fresh_optimizer}
    swept(patch_gradients, run, state=states, task_of=partial(Watched, calls=tmp_path / "calls"))
    assert (tmp_path / "calls").read_text().split() == ["8"]


class OfAnotherModel:
    """A task of a user's own: a linear model without batches."""

    def __init__(self, run: Trajectory) -> None:
        self.width = run.config["width"]

    def recipe(self) -> Recipe:
        def loss(model, batch):  # a closure, which no worker could be sent
            return (model(batch) - 1).square().mean()

        return Recipe(torch.nn.Linear(self.width, 1), loss, partial(torch.optim.SGD, lr=0.1))


def mean_output(model, batch):
    return model(batch).squeeze(-1)


def test_other_peoples_runs_are_swept_by_their_own_task(tmp_path):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TrajectoryWriter.create(tmp_path / "run", {"width": 3}) as writer:
        for step in (0, 5):
            writer.append(Checkpoint.capture(model, optimizer, step=step))
    one, other, probe = torch.eye(3)[:1], torch.eye(3)[1:2], torch.ones(2, 3)
    before = torch.get_rng_state()
    found = dy.sweep(
        patch_gradients,
        Trajectory.open(tmp_path / "run"),
        [0, 5],
        [Contrast(one, other, probe)],
        sites.parameters,
        mean_output,
        task_of=OfAnotherModel,
        out=tmp_path / "kept",
    )
    assert found["effect"].shape == (2, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_of_no_task_of_the_package_is_refused_with_the_argument_that_helps(tmp_path):
    model = torch.nn.Linear(3, 1)
    with TrajectoryWriter.create(tmp_path / "run", {"width": 3}) as writer:
        writer.append(Checkpoint.capture(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    run, asked = Trajectory.open(tmp_path / "run"), [Contrast(torch.eye(3), torch.eye(3), torch.eye(3))]
    with pytest.raises(SweepError, match=r"the keys \['width'\]. Say with task_of="):
        dy.sweep(patch_gradients, run, [0], asked, sites.parameters, mean_output)


@pytest.mark.slow
@pytest.mark.usefixtures("small_units", "workers_at_hand")
def test_serial_and_two_workers_give_identical_datasets_in_memory_and_kept(runs, tmp_path):
    states = {"stored": planning.as_stored, "fresh": Checkpoint.with_fresh_optimizer}
    asked = partial(
        dy.sweep,
        patch_gradients,
        runs,
        STEPS,
        lambda task, step: task.contrasts()[:2],
        sites.heads,
        measures.correct_logit,
        state=states,
    )
    serial = asked()
    xr.testing.assert_identical(asked(workers=2), serial)
    xr.testing.assert_identical(asked(workers=2, out=tmp_path), serial)
    xr.testing.assert_identical(asked(out=tmp_path / "other"), serial)


def killing(recipe, checkpoint, contrasts, sites, measure, calls: Path) -> xr.Dataset:
    """A verb whose process is killed from outside, once, after some units are done."""
    struck = calls.with_name("struck")
    if lines(calls) > 4 and not struck.exists():
        struck.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return counted(recipe, checkpoint, contrasts, sites, measure, calls)


@pytest.mark.slow
@pytest.mark.usefixtures("small_units", "workers_at_hand")
@pytest.mark.parametrize("kept", [True, False])
def test_a_worker_killed_in_the_middle_loses_nothing(run, tmp_path, kept):
    calls = tmp_path / "calls"
    out = tmp_path / "kept" if kept else None
    found = swept(partial(killing, calls=calls), run, workers=2, out=out)
    assert (tmp_path / "struck").exists()
    expected = swept(patch_gradients, run)
    xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))
    if kept:
        assert len(list((tmp_path / "kept" / "shards").iterdir())) == 8


def failing(recipe, checkpoint, contrasts, sites, measure) -> xr.Dataset:
    if checkpoint.step == 9:
        raise ArithmeticError("not at this step")
    return patch_gradients(recipe, checkpoint, contrasts, sites, measure)


@pytest.mark.slow
@pytest.mark.usefixtures("workers_at_hand")
def test_a_verb_that_fails_in_a_worker_says_so_here_and_where(run, tmp_path):
    with pytest.raises(ArithmeticError, match="not at this step") as caught:
        swept(failing, run, workers=2, out=tmp_path)
    assert caught.value.__notes__ == [f"This was at step 9 of {run.path}."]


@pytest.mark.slow
def test_a_running_cluster_is_used_by_its_scheduler_file(run, tmp_path):
    """Somebody else's: one worker of two threads, here, that knows nothing of sweeps."""
    from distributed import Client, LocalCluster

    file = tmp_path / "scheduler.json"
    quiet = {"dashboard_address": None, "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"}}
    theirs = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "protocol": "tcp", **quiet}
    with LocalCluster(**theirs) as cluster, Client(cluster) as client:
        client.write_scheduler_file(str(file))
        found = swept(patch_gradients, run, scheduler=str(file), out=tmp_path / "kept")
    xr.testing.assert_identical(found, swept(patch_gradients, run))


@pytest.mark.slow
def test_the_callers_random_numbers_threads_and_runs_are_left_alone(run, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before, files = torch.get_rng_state(), {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    swept(patch_gradients, run, out=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "was given no runs"),
        ({"steps": []}, "was given no steps"),
        ({"contrasts": []}, "was given no contrasts"),
        ({"sites": []}, "was given no sites"),
        ({"state": {}}, "was given no states"),
        ({"steps": [8, 13]}, "step 13 is not a step of .* from 0 to 12"),
        ({"steps": [-1]}, "step -1 is not a step"),
        ({"steps": [8, 9, 8]}, "step 8 more than once"),
        ({"workers": -1}, "found workers=-1"),
        ({"workers": 2, "scheduler": "tcp://localhost:1"}, "found workers=2 and scheduler="),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_computed(run, tmp_path, changes, message):
    calls = tmp_path / "calls"
    given = {"runs": run, "steps": [8], "contrasts": alone, "sites": sites.heads, **changes}
    with pytest.raises(SweepError, match=message):
        dy.sweep(partial(counted, calls=calls), measure=measures.correct_logit, **given)
    assert not calls.exists()


def test_runs_of_one_seed_must_be_named(runs):
    with pytest.raises(SweepError, match=r"seeds \[0, 0\].*dict by label"):
        swept(patch_gradients, [runs[0], runs[0]])


def test_contrasts_of_one_name_are_refused(run):
    task = tasks.load(run.config)
    twice = [task.contrasts()[0]] * 2
    with pytest.raises(SweepError, match=r"was given example .* more than once"):
        dy.sweep(patch_gradients, run, 8, twice, sites.heads, measures.correct_logit)


def test_runs_that_differ_in_their_sites_or_in_the_number_of_their_contrasts_are_refused(runs):
    def fewer(task, step):
        return task.contrasts()[task.config.seed :]

    with pytest.raises(SweepError, match=r"run 1 has at step 8 3 contrasts .* run 0 at step 8, 4 contrasts"):
        dy.sweep(patch_gradients, runs, 8, fewer, sites.heads, measures.correct_logit)
    turns = iter([sites.heads, sites.layers])
    with pytest.raises(SweepError, match="run 1 has other sites than run 0"):
        dy.sweep(patch_gradients, runs, 8, alone, lambda model: next(turns)(model), measures.correct_logit)


def test_a_verb_whose_result_has_no_examples_is_refused(run):
    def averaged(*arguments):
        return patch_gradients(*arguments).mean("example")

    with pytest.raises(SweepError, match=r"averaged returned the dims \['site'\]; expected 'example'"):
        swept(averaged, run, 8)


def test_a_damaged_checkpoint_is_named(tmp_path):
    run = trained(tmp_path / "run", 0)
    victim = run.path / "trajectory" / "step-00000008.h5"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(TrajectoryError, match=r"step-00000008\.h5 is damaged"):
        swept(patch_gradients, run)


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
def test_an_estimate_counts_what_is_left_and_keeps_nothing(run, tmp_path):
    asked = sweeps.plan(patch_gradients, run, STEPS, alone, sites.heads, measures.correct_logit)
    before = sweeps.estimate(asked, tmp_path)
    assert (before.replays, before.kept) == (4 * 2 * 2, 0)
    assert 0 < before.seconds < 60
    assert before.megabytes > 50
    assert list(tmp_path.iterdir()) == []
    results.save(asked.units[0].compute(), sweeps.shards.shard(tmp_path, asked.units[0]))
    after = sweeps.estimate(asked, tmp_path)
    assert (after.replays, after.kept) == (14, 2)
    sweeps.run(asked, tmp_path)
    done = sweeps.estimate(asked, tmp_path)
    assert (done.replays, done.kept) == (0, 16)
    assert 0 < done.seconds < 60  # what is there has to be read
    assert str(done).startswith("0 replays (16 more are there already): about ")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.26, "1.3 s"), (42.4, "42 s"), (150, "2 min"), (7300, "2 h 2 min")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert sweeps.estimates.duration(seconds) == text
