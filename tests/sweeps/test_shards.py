"""What a sweep keeps, and that stale shards are never read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryWriter
from dynamics import measures, sites, sweeps, tasks
from dynamics.patching import (
    both_directions,
    patch_gradients,
    patch_updates,
)
from dynamics.recipe import Contrast
from dynamics.sweeps import SweepError, planning, units
from dynamics.sweeps.digests import digest
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
def test_what_is_there_is_read_and_what_is_missing_alone_is_computed(run, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "kept"
    verb = partial(counted, calls=calls)
    first = swept(verb, run, out=out)
    assert lines(calls) == 8
    xr.testing.assert_identical(swept(verb, run, out=out), first)
    assert lines(calls) == 8
    for path in sorted((out / "shards").iterdir())[:3]:
        path.unlink()
    xr.testing.assert_identical(swept(verb, run, out=out), first)
    assert lines(calls) == 11


def interrupted(recipe, checkpoint, contrasts, sites, measure, calls: Path) -> xr.Dataset:
    stopped = calls.with_name("stopped")
    if lines(calls) == 5 and not stopped.exists():
        stopped.touch()
        raise KeyboardInterrupt
    return counted(recipe, checkpoint, contrasts, sites, measure, calls)


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
def test_a_sweep_that_is_stopped_in_the_middle_goes_on_from_there(run, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        swept(partial(interrupted, calls=calls), run, out=out)
    assert len(list((out / "shards").iterdir())) == lines(calls) == 5
    swept(partial(interrupted, calls=calls), run, out=out)
    assert lines(calls) == 8


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_that_was_moved_or_trained_on_keeps_its_shards(tmp_path):
    verb = partial(counted, calls=tmp_path / "calls")
    run = trained(tmp_path / "run", 0)
    first = swept(verb, run, out=tmp_path / "kept")
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    with TrajectoryWriter.resume(tmp_path / "elsewhere") as writer:
        writer.append(replace(run_at(tmp_path / "elsewhere", 12), step=14))
    second = swept(verb, Trajectory.open(tmp_path / "elsewhere"), out=tmp_path / "kept")
    assert lines(tmp_path / "calls") == 8
    assert (second["effect"].values == first["effect"].values).all()


def run_at(folder: Path, step: int) -> Checkpoint:
    return Trajectory.open(folder).at(step)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_sweeps_dataset_says_where_it_comes_from_and_not_when(runs):
    facts = json.loads(swept(patch_gradients, runs).attrs["provenance"])
    assert facts["verb"] == "patch_gradients"
    assert facts["steps"] == STEPS
    assert facts["configs"]["1"]["seed"] == 1
    assert json.loads(swept(patch_gradients, runs[0], 8).attrs["provenance"])["config"]["seed"] == 0
    assert facts["measures"] == ["correct_logit"]
    assert "versions" in facts
    assert "date" not in facts


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


@pytest.mark.slow
def test_another_measure_of_the_same_name_is_computed_anew(run, tmp_path):
    where = {"verb": patch_gradients, "runs": run, "steps": 8, "contrasts": alone, "sites": sites.heads}
    one, two = (dy.sweep(**where, measure=scaled(factor), out=tmp_path) for factor in (1.0, 2.0))
    torch.testing.assert_close(torch.tensor(two["base"].values), 2 * torch.tensor(one["base"].values))
    assert len(list((tmp_path / "shards").iterdir())) == 2


@pytest.mark.slow
def test_shards_of_other_code_are_named_where_they_are_not_used(run, tmp_path, caplog, monkeypatch):
    swept(patch_gradients, run, 8, out=tmp_path)
    (before,) = tmp_path.glob("*.json")
    (tmp_path / "notes.json").write_text("[1, 2")
    swept(patch_gradients, run, 9, out=tmp_path)
    swept(patch_gradients, run, 8, out=tmp_path)
    assert not caplog.text
    monkeypatch.setattr(units, "sources", lambda: "edited")
    swept(patch_gradients, run, 8, out=tmp_path)
    assert f"{before} was asked in the same words, of other code" in caplog.text
    assert caplog.text.count("asked in the same words") == 1
    caplog.clear()
    swept(patch_gradients, run, 8, out=tmp_path)
    assert not caplog.text


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


@pytest.mark.slow
def test_no_two_questions_share_a_shard_and_the_same_question_has_the_same(runs):
    asked = [keys(runs[0], **change) for change in [{}, {"runs": runs[1]}, *CHANGES]]
    again = [keys(runs[0], **change) for change in [{}, {"runs": runs[1]}, *CHANGES]]
    assert asked == again
    assert len(set.union(*asked)) == sum(map(len, asked))


@pytest.mark.slow
def test_the_same_question_has_the_same_shards_in_a_new_process(run):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.sweeps import test_shards as t\n"
        "print(*sorted(set.union(*(t.keys(t.Trajectory.open(sys.argv[2]), **c) for c in [{}, *t.CHANGES]))))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2]), str(run.path)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}  # strings hash otherwise here
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert len(there.split()) == len(CHANGES) + 1
    assert there.split() == sorted(set.union(*(keys(run, **change) for change in [{}, *CHANGES])))


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
    with TrajectoryWriter.resume(other.path) as writer:
        writer.configure(run.config)
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
