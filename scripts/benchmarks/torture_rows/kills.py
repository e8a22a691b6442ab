"""SIGKILL at random moments: of recording, imports and training, by every way to them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml

import dynamics as dy
from checkpoints import Trajectory, TrajectoryWriter
from dynamics.cli import main as cli
from dynamics.config import ScheduleConfig
from scripts.benchmarks.torture_rows.recordings import TINY, opened, record, recorded_by_lightning
from scripts.benchmarks.torture_rows.trials import forked


def recording(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """SIGKILL at random moments of recording: 0 unreadable, 0 finished checkpoints lost"""
    TrajectoryWriter.create(folder, {}).close()
    for _ in range(n):
        with suppress(FileNotFoundError):
            (folder / "finished").unlink()
        forked(partial(record, folder), kill_after=float(rng.uniform(0.02, 0.2)))
        marked = folder / "finished"
        finished = int(marked.read_text() or -1) if marked.exists() else -1
        yield forked(partial(opened, folder, finished))
        if len(Trajectory.open(folder)) > 100:
            folder = folder.with_name(f"{folder.name}-")
            TrajectoryWriter.create(folder, {}).close()


def imports(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """SIGKILL at random moments of an import: 0 unreadable, the next call finishes it"""
    folder.mkdir()
    for step in range(30):
        torch.save({"w": torch.full((5_000,), float(step))}, folder / f"m_{step}.pt")
    for trial in range(n):
        out = folder / f"run-{trial}"
        work = partial(Trajectory.from_state_dicts, folder, out)
        forked(lambda work=work: work() and "done", kill_after=float(rng.uniform(0.02, 0.4)))  # type: ignore[misc]
        work()
        yield forked(partial(opened, out, 29))


def fits(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Training killed at random moments of every phase and called again: equal bit for bit, metrics too"""
    began = time.perf_counter()
    whole = dy.training.fit(TINY, folder / "whole")
    seconds = time.perf_counter() - began
    for trial in range(n):
        out = folder / f"run-{trial}"
        forked(lambda out=out: str(dy.training.fit(TINY, out)), kill_after=float(rng.uniform(0, seconds)))  # type: ignore[misc]
        run = dy.training.fit(TINY, out)
        same = run.steps == whole.steps and all(run.at(s).equals(whole.at(s)) for s in run.steps)
        same &= run.read_file("metrics.csv") == whole.read_file("metrics.csv") and run.verify() == []
        yield "equal" if same else "BROKEN: another run"


def lightning(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """SIGKILL at random moments of a Lightning loop with a recorder: 0 unreadable, 0 finished checkpoints lost"""
    for trial in range(n):
        out = folder / f"run-{trial}"
        TrajectoryWriter.create(out, {}).close()
        forked(partial(recorded_by_lightning, out), kill_after=float(rng.uniform(0.05, 1.5)))
        run, marked = Trajectory.open(out), out / "finished"
        finished = int(marked.read_text() or -1) if marked.exists() else -1
        if run.verify() or run.steps != tuple(range(len(run))) or len(run) < finished + 1:
            yield f"BROKEN: {len(run)} checkpoints of {finished + 1} that were finished; {run.verify()}"
        else:
            yield "opens whole" if len(run) else "killed before the first checkpoint"


def study(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """`dynamics study aliases` killed at random moments and called again: the same results, findings and run"""
    folder.mkdir()
    watched = replace(TINY, schedule=ScheduleConfig(evaluate_every=1))
    (folder / "study.yaml").write_text(yaml.safe_dump(watched.to_dict()))

    def work(out: Path) -> str:
        cli(["study", "aliases", "--config", str(folder / "study.yaml"), "--out", str(out)])
        return "done"

    began = time.perf_counter()
    done = forked(partial(work, folder / "whole"))
    seconds = time.perf_counter() - began
    for trial in range(n):
        out = folder / f"run-{trial}"
        forked(partial(work, out), kill_after=float(rng.uniform(0, seconds)))
        done = forked(partial(work, out))
        yield done if done != "done" else forked(partial(same_study, folder / "whole", out))


def same_study(one: Path, other: Path) -> str:
    """Whether two folders of a study hold the same run, results and findings."""
    whole, again = Trajectory.open(one), Trajectory.open(other)
    same = whole.steps == again.steps and all(whole.at(s).equals(again.at(s)) for s in whole.steps)
    same &= (one / "findings.md").read_bytes() == (other / "findings.md").read_bytes()
    results = sorted(path.name for path in (one / "results").glob("*.h5"))
    for name in results:
        ours, theirs = (dy.results.load(run / "results" / name).drop_attrs() for run in (one, other))
        same &= ours.identical(theirs)
    report = dy.steps.verify_files(again)
    return "equal" if same and results and not report.problems else f"BROKEN: another study {report.problems}"
