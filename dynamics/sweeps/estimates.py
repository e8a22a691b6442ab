"""What a sweep will take, before it is begun: seconds and memory, from constants measured on this machine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from dynamics import results
from dynamics.sweeps import shards
from dynamics.sweeps.planning import Plan
from dynamics.sweeps.units import Question, Unit, forget, reached

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """What is left to do of a sweep, and what it will take.

    Attributes:
        replays: examples times sites to be computed.
        kept: those whose results are there already.
        seconds: until the sweep returns.
        megabytes: of resident memory in each process.
        workers: processes beside this one; 0 where this one computes.
    """

    replays: int
    kept: int
    seconds: float
    megabytes: float
    workers: int

    def __str__(self) -> str:
        there = f" ({self.kept:,} more are there already)" if self.kept else ""
        who = f"{self.workers} workers and this process" if self.workers else "this process"
        memory = f"{self.megabytes:,.0f} MB" + (" each" if self.workers else "")
        return f"{self.replays:,} replays{there}: about {duration(self.seconds)} and {memory}, by {who}."


def estimate(asked: Plan, out: str | os.PathLike[str] | None = None, workers: int = 0) -> Estimate:
    """What it takes to carry out a plan: one unit of work of each run is tried and timed, and nothing kept.

    Args:
        asked: from `plan`.
        out, workers: as they will be given to `run`.
    """
    kept: list[Path] = []
    todo: list[Unit] = []
    for unit in asked.units:
        path = None if out is None else shards.shard(Path(out).resolve(), unit)
        if path is not None and path.exists():
            kept.append(path)
        else:
            todo.append(unit)
    seconds = 0.0
    try:
        for question in asked.questions.values():
            if units := [unit for unit in todo if unit.question == question]:
                seconds += _seconds(question, units)
    finally:
        forget()
    if workers and todo:
        seconds = seconds / workers + _seconds_to_start()
    if kept:
        seconds += _timed(lambda: results.load(kept[0]))[0] * len(kept)
    replays = sum(unit.replays for unit in todo)
    return Estimate(replays, asked.replays - replays, seconds, peak_megabytes(), workers)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"


def peak_megabytes() -> float:
    """The most resident memory that this process or one of its finished children ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = [resource.getrusage(of).ru_maxrss for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(peaks) * unit / 1e6


def _seconds(question: Question, units: Sequence[Unit]) -> float:
    """All units of one run, one after another in this process."""
    behind = {unit.step: _behind(question, unit.step) for unit in units}
    pairs = dict.fromkeys((unit.step, unit.source_step) for unit in units)
    giving = question.source or question
    reaches = [*behind.values(), *(_behind(giving, source) for _, source in pairs if source is not None)]
    near = min((unit.step for unit in units), key=lambda step: (behind[step] == 0, behind[step]))
    start = near - behind[near]
    _seconds_to_reach(question, start)  # warms up
    load, reach = _seconds_to_reach(question, start), _seconds_to_reach(question, near)
    train = max(0.0, reach - load) / max(1, behind[near])
    trial = next(unit for unit in units if unit.step == near)
    replace(trial, contrasts=trial.contrasts[:1]).compute()  # warms up
    computing, found = _timed(trial.compute)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.h5"
        keeping, _ = _timed(lambda: shards.keep(found, path))
    return (
        sum(load + train * distance for distance in reaches)
        + computing / len(trial.contrasts) * sum(len(unit.contrasts) for unit in units)
        + keeping * len(units)
    )


def _behind(question: Question, step: int) -> int:
    """How many steps lie between a step and the stored checkpoint that it is reached from."""
    return step - max(stored for stored in question.run.steps if stored <= step)


def _seconds_to_reach(question: Question, step: int) -> float:
    reached.cache_clear()
    return _timed(lambda: reached(question, step))[0]


def _seconds_to_start() -> float:
    """Until a worker process has imported what it works with."""
    code = "import distributed, dynamics.sweeps, dynamics.patching, dynamics.attribution"
    return _timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))[0]


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value
