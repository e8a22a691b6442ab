"""A sweep is its verb at every step of every run, whoever computes it and however often it was interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
    AliasConfig,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    PrimaryConfig,
    StudyConfig,
    ToyConfig,
)
from dynamics.patching import (
    both_directions,
    interactions,
    patch_gradients,
    patch_signals,
    patch_updates,
    patch_window,
)
from dynamics.recipe import Contrast, Recipe
from dynamics.sweeps import SweepError, planning, units
from dynamics.sweeps.digests import digest
from dynamics.tasks import AliasTask

STEPS = [8, 9, 10]
"""In X2; 9 lies between stored checkpoints."""


def trained(folder: Path, seed: int) -> Trajectory:
    """A run of twelve steps with every second checkpoint stored."""
    phase = PhaseConfig(4)
    config = StudyConfig(
        task=AliasConfig(modulus=8, multipliers=(2, 3), train_multipliers=1),
        model=ToyConfig(n_heads=2, d_model=8, d_head=4, d_mlp=8, n_layers=1),
        phases=PhasesConfig(pretrain=phase, x1=phase, x2=phase, batch_size=8),
        patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
        seed=seed,
    )
    task = AliasTask(config)
    recipe = task.recipe()
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    state = Checkpoint.capture(recipe.model, optimizer, recipe.build_scheduler(optimizer), 0)
    with TrajectoryWriter.create(folder, config.to_dict()) as writer:
        for step in range(0, 13, 2):
            state = steps.advance(recipe, state, step, task.batch)
            writer.append(state)
    return Trajectory.open(folder)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Trajectory]:
    return [trained(tmp_path_factory.mktemp("runs") / f"seed {seed}", seed) for seed in (0, 1)]


@pytest.fixture
def run(runs) -> Trajectory:
    return runs[0]


@pytest.fixture
def small_units(monkeypatch):
    """Units of one contrast, so that there are many."""
    monkeypatch.setattr(planning, "UNIT_REPLAYS", 1)


def alone(task: AliasTask, step: int) -> list[Contrast]:
    return task.contrasts()


def counted(recipe, checkpoint, contrasts, sites, measure, calls: Path, verb=patch_gradients) -> xr.Dataset:
    """A verb that writes a line for every contrast it is given."""
    with calls.open("a") as file:
        file.writelines(f"{checkpoint.step} {contrast.coords['example']}\n" for contrast in contrasts)
    return verb(recipe, checkpoint, contrasts, sites, measure)


def patch_signals_at(recipe, checkpoint, contrasts, sites, measure, forward) -> xr.Dataset:
    places = dy.sites.activations(recipe.model, "blocks.*.hook_resid_pre")
    return patch_signals(recipe, checkpoint, contrasts, places, measure, forward)


def lines(calls: Path) -> int:
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def swept(verb, run, steps=STEPS, **settings: Any) -> xr.Dataset:
    return dy.sweep(verb, run, steps, alone, sites.heads, measures.correct_logit, **settings)


# --- what it computes -------------------------------------------------------------------------------------


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


def test_lists_of_contrasts_and_sites_do_as_well_as_functions(run):
    task = tasks.load(run.config)
    listed = dy.sweep(
        patch_gradients, run, STEPS, task.contrasts(), sites.heads(task.model()), measures.correct_logit
    )
    xr.testing.assert_identical(listed, swept(patch_gradients, run))


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


def test_contrasts_may_depend_on_the_step(run):
    found = dy.sweep(patch_gradients, run, STEPS, AliasTask.contrasts_at, sites.heads, measures.correct_logit)
    task = tasks.load(run.config)
    expected = [[c.coords["in_batch"] for c in task.contrasts_at(step)] for step in STEPS]
    assert found["in_batch"].broadcast_like(found["base"]).transpose("step", ...).values.tolist() == expected


def test_several_states_make_a_dim_optimizer_and_one_makes_none(run):
    states = {"stored": planning.as_stored, "fresh": Checkpoint.with_fresh_optimizer}
    both = swept(patch_gradients, run, state=states)
    assert both["effect"].dims == ("optimizer", "step", "example", "site")
    for name, state in states.items():
        xr.testing.assert_equal(
            both.sel(optimizer=name).drop_vars("optimizer"), swept(patch_gradients, run, state=state)
        )
    assert not both["effect"].sel(optimizer="stored").equals(both["effect"].sel(optimizer="fresh"))


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


# --- who computes it --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
def test_serial_and_two_workers_give_identical_datasets_in_memory_and_kept(runs, tmp_path):
    states = {"stored": planning.as_stored, "fresh": Checkpoint.with_fresh_optimizer}
    serial = swept(patch_gradients, runs, state=states)
    xr.testing.assert_identical(swept(patch_gradients, runs, state=states, workers=2), serial)
    xr.testing.assert_identical(swept(patch_gradients, runs, state=states, workers=2, out=tmp_path), serial)
    xr.testing.assert_identical(swept(patch_gradients, runs, state=states, out=tmp_path / "other"), serial)


def killing(recipe, checkpoint, contrasts, sites, measure, calls: Path) -> xr.Dataset:
    """A verb whose process is killed from outside, once, after some units are done."""
    struck = calls.with_name("struck")
    if lines(calls) > 4 and not struck.exists():
        struck.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return counted(recipe, checkpoint, contrasts, sites, measure, calls)


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("kept", [True, False])
def test_a_worker_killed_in_the_middle_loses_nothing(run, tmp_path, kept):
    calls = tmp_path / "calls"
    out = tmp_path / "kept" if kept else None
    found = swept(partial(killing, calls=calls), run, workers=2, out=out)
    assert (tmp_path / "struck").exists()
    expected = swept(patch_gradients, run)
    xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))
    if kept:
        assert len(list((tmp_path / "kept" / "shards").iterdir())) == 12


def failing(recipe, checkpoint, contrasts, sites, measure) -> xr.Dataset:
    if checkpoint.step == 9:
        raise ArithmeticError("not at this step")
    return patch_gradients(recipe, checkpoint, contrasts, sites, measure)


@pytest.mark.slow
def test_a_verb_that_fails_in_a_worker_says_so_here_and_where(run, tmp_path):
    with pytest.raises(ArithmeticError, match="not at this step") as caught:
        swept(failing, run, workers=1, out=tmp_path)
    assert caught.value.__notes__ == [f"This was at step 9 of {run.path}."]


@pytest.mark.slow
def test_a_running_cluster_is_used_by_its_scheduler_file(run, tmp_path):
    file = tmp_path / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    start = partial(subprocess.Popen, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    here = ["--host", "127.0.0.1", "--no-dashboard"]
    dask = [sys.executable, "-m", "dask"]
    processes = [start([*dask, "scheduler", "--scheduler-file", str(file), *here, "--port", "0"])]
    try:
        processes.append(start([*dask, "worker", "--scheduler-file", str(file), "--nthreads", "2", *here]))
        deadline = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        found = swept(patch_gradients, run, scheduler=str(file), out=tmp_path / "kept")
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)
    xr.testing.assert_identical(found, swept(patch_gradients, run))


def test_the_callers_random_numbers_threads_and_runs_are_left_alone(run, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before, files = torch.get_rng_state(), {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    swept(patch_gradients, run, out=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == files


# --- what is kept -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_units")
def test_what_is_there_is_read_and_what_is_missing_alone_is_computed(run, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "kept"
    verb = partial(counted, calls=calls)
    first = swept(verb, run, out=out)
    assert lines(calls) == 12
    xr.testing.assert_identical(swept(verb, run, out=out), first)
    assert lines(calls) == 12
    for path in sorted((out / "shards").iterdir())[:3]:
        path.unlink()
    xr.testing.assert_identical(swept(verb, run, out=out), first)
    assert lines(calls) == 15


def interrupted(recipe, checkpoint, contrasts, sites, measure, calls: Path) -> xr.Dataset:
    stopped = calls.with_name("stopped")
    if lines(calls) == 7 and not stopped.exists():
        stopped.touch()
        raise KeyboardInterrupt
    return counted(recipe, checkpoint, contrasts, sites, measure, calls)


@pytest.mark.usefixtures("small_units")
def test_a_sweep_that_is_stopped_in_the_middle_goes_on_from_there(run, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        swept(partial(interrupted, calls=calls), run, out=out)
    assert len(list((out / "shards").iterdir())) == lines(calls) == 7
    swept(partial(interrupted, calls=calls), run, out=out)
    assert lines(calls) == 12


@pytest.mark.usefixtures("small_units")
def test_further_steps_states_and_runs_use_what_is_there(runs, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "kept"
    verb = partial(counted, calls=calls)
    swept(verb, runs[0], [8], out=out)
    assert lines(calls) == 4
    swept(verb, runs[0], [8, 9], out=out)
    assert lines(calls) == 8
    swept(verb, runs, 8, out=out)
    assert lines(calls) == 12
    states = {"stored": planning.as_stored, "fresh": Checkpoint.with_fresh_optimizer}
    swept(verb, runs, 8, out=out, state=states)
    assert lines(calls) == 20


def test_a_run_that_was_moved_or_trained_on_keeps_its_shards(tmp_path):
    verb = partial(counted, calls=tmp_path / "calls")
    run = trained(tmp_path / "run", 0)
    first = swept(verb, run, out=tmp_path / "kept")
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    with TrajectoryWriter.resume(tmp_path / "elsewhere") as writer:
        writer.append(replace(run_at(tmp_path / "elsewhere", 12), step=14))
    second = swept(verb, Trajectory.open(tmp_path / "elsewhere"), out=tmp_path / "kept")
    assert lines(tmp_path / "calls") == 12
    assert (second["effect"].values == first["effect"].values).all()


def run_at(folder: Path, step: int) -> Checkpoint:
    return Trajectory.open(folder).at(step)


def test_beside_the_shards_stands_what_they_are(runs, tmp_path):
    swept(partial(patch_signals_at, forward="source"), runs, 8, out=tmp_path)
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert path.name.startswith("patch_signals_at-")
    assert written["verb"] == "patch_signals_at(forward='source')"
    assert written["runs"] == {str(seed): str(run.path) for seed, run in enumerate(runs)}
    assert written["sites"] == ["L0H0", "L0H1"]
    assert set(written["shards"]) == {p.name for p in (tmp_path / "shards").iterdir()}
    assert {(shard["run"], shard["step"]) for shard in written["shards"].values()} == {("0", 8), ("1", 8)}


def test_a_sweeps_dataset_says_where_it_comes_from_and_not_when(runs):
    facts = json.loads(swept(patch_gradients, runs).attrs["provenance"])
    assert facts["verb"] == "patch_gradients"
    assert facts["steps"] == STEPS
    assert facts["configs"]["1"]["seed"] == 1
    assert json.loads(swept(patch_gradients, runs[0], 8).attrs["provenance"])["config"]["seed"] == 0
    assert facts["measures"] == ["correct_logit"]
    assert "versions" in facts
    assert "date" not in facts


# --- stale shards are never read --------------------------------------------------------------------------

THRESHOLD = 1.0


def doubled(x):
    return 2 * x


def helped(model, batch):
    return doubled(measures.correct_logit(model, batch)) + THRESHOLD


def scaled(factor: float):
    return lambda model, batch: factor * measures.correct_logit(model, batch)


def keys(run, **changes: Any) -> set[str]:
    given: dict[str, Any] = {
        "verb": patch_gradients,
        "runs": run,
        "steps": [8],
        "contrasts": alone,
        "sites": sites.heads,
        "measure": measures.correct_logit,
    }
    return {unit.identity for unit in sweeps.plan(**{**given, **changes}).units}


def test_another_measure_of_the_same_name_is_computed_anew(run, tmp_path):
    where = {"verb": patch_gradients, "runs": run, "steps": 8, "contrasts": alone, "sites": sites.heads}
    one, two = (dy.sweep(**where, measure=scaled(factor), out=tmp_path) for factor in (1.0, 2.0))
    torch.testing.assert_close(torch.tensor(two["base"].values), 2 * torch.tensor(one["base"].values))
    assert len(list((tmp_path / "shards").iterdir())) == 2


def only_first(model):
    return sites.heads(model)[:1]


def reached_further(model):
    head, *others = sites.heads(model)
    return [replace(head, covers=others[0].covers), *others]


def other_probe(task: AliasTask, step: int) -> list[Contrast]:
    first, second, *rest = task.contrasts()
    return [replace(first, probe=second.probe), second, *rest]


CHANGES: list[dict[str, Any]] = [
    {"verb": patch_updates},
    {"verb": partial(both_directions, patch_gradients)},
    {"verb": partial(both_directions, patch_updates)},
    {"steps": [9]},
    {"sites": only_first},
    {"sites": reached_further},
    {"contrasts": other_probe},
    {"contrasts": AliasTask.contrasts_at},
    {"measure": measures.centred_logit},
    {"measure": {"correct_logit": measures.correct_logit}},
    {"measure": {"correct_logit": measures.centred_logit}},
    {"measure": scaled(1.0)},
    {"measure": scaled(2.0)},
    {"measure": helped},
    {"state": Checkpoint.with_fresh_optimizer},
    {"task_of": lambda run: tasks.load({**run.config, "seed": 5})},
]


def test_no_two_questions_share_a_shard_and_the_same_question_has_the_same(runs):
    asked = [keys(runs[0], **change) for change in [{}, {"runs": runs[1]}, *CHANGES]]
    again = [keys(runs[0], **change) for change in [{}, {"runs": runs[1]}, *CHANGES]]
    assert asked == again
    assert len(set.union(*asked)) == sum(map(len, asked))


def test_the_same_question_has_the_same_shards_in_a_new_process(run):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_sweeps as t\n"
        "print(*sorted(set.union(*(t.keys(t.Trajectory.open(sys.argv[2]), **c) for c in [{}, *t.CHANGES]))))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(run.path)]
    found = [
        subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": n}
        )
        for n in ("1", "7")
    ]
    assert len(found[0].stdout.split()) == len(CHANGES) + 1
    assert found[0].stdout == found[1].stdout


@pytest.mark.parametrize(("name", "value"), [("THRESHOLD", 2.0), ("doubled", lambda x: 3 * x)])
def test_a_measure_that_refers_to_something_else_now_is_another(run, monkeypatch, name, value):
    before = keys(run, measure=helped)
    monkeypatch.setitem(globals(), name, value)
    assert not before & keys(run, measure=helped)


def test_other_code_of_the_package_and_other_versions_are_another_question(run, monkeypatch):
    before = keys(run)
    with monkeypatch.context() as patch:
        patch.setattr(units, "sources", lambda: "edited")
        assert not before & keys(run)
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert not before & keys(run)


def test_a_checkpoint_that_was_trained_anew_is_another(tmp_path, run):
    other = trained(tmp_path / "run", 1)
    manifest = json.loads((other.path / "manifest.json").read_text())
    manifest["config"] = json.loads((run.path / "manifest.json").read_text())["config"]
    (other.path / "manifest.json").write_text(json.dumps(manifest))
    assert not keys(run) & keys(Trajectory.open(other.path))


class Cached:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, model, batch):
        return self.scale * measures.correct_logit(model, batch)


def test_values_are_told_apart_by_what_they_hold():
    t = torch.arange(6.0)
    pairs: list[tuple[Any, Any]] = [
        (1, True),
        (1, 1.0),
        ("1", 1),
        ([1, 2], (1, 2)),
        ([[1], [2]], [[1, 2], []]),
        (("ab", "c"), ("a", "bc")),
        (t, t.double()),
        (t, t.reshape(2, 3)),
        (t, -t),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (slice(0, 1), slice(0, 2)),
        (Cached(1.0), Cached(2.0)),
        (Cached(1.0).__call__, Cached(2.0).__call__),
        (partial(max, 1), partial(max, 2)),
        (torch.relu, torch.tanh),
        (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    ]
    for one, other in pairs:
        assert digest(one) != digest(other)
        assert digest(one) == digest(one)
    assert digest({1, 2, 3}) == digest({3, 2, 1})
    assert digest(Cached(1.0)) == digest(Cached(1.0))
    with pytest.raises(SweepError, match="generator cannot be told from others of its kind"):
        digest(i for i in range(3))


def test_the_same_function_defined_twice_is_the_same():
    assert digest(scaled(2.0)) == digest(scaled(2.0))
    assert digest(scaled(2.0)) != digest(scaled(3.0))


# --- what it refuses --------------------------------------------------------------------------------------


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


# --- what it will take ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_units")
def test_an_estimate_counts_what_is_left_and_keeps_nothing(run, tmp_path):
    asked = sweeps.plan(patch_gradients, run, STEPS, alone, sites.heads, measures.correct_logit)
    before = sweeps.estimate(asked, tmp_path)
    assert (before.replays, before.kept) == (4 * 2 * 3, 0)
    assert 0 < before.seconds < 60
    assert before.megabytes > 50
    assert list(tmp_path.iterdir()) == []
    results.save(asked.units[0].compute(), sweeps.shards.shard(tmp_path, asked.units[0]))
    after = sweeps.estimate(asked, tmp_path)
    assert (after.replays, after.kept) == (22, 2)
    sweeps.run(asked, tmp_path)
    done = sweeps.estimate(asked, tmp_path)
    assert (done.replays, done.kept) == (0, 24)
    assert 0 < done.seconds < 60  # what is there has to be read
    assert str(done).startswith("0 replays (24 more are there already): about ")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.26, "1.3 s"), (42.4, "42 s"), (150, "2 min"), (7300, "2 h 2 min")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert sweeps.estimates.duration(seconds) == text
