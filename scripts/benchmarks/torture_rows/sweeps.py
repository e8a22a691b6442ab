"""Sweeps that are killed, alone or with their workers, and two sweeps at one folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory
from dynamics import measures, sites
from scripts.benchmarks.torture_rows.recordings import TINY
from scripts.benchmarks.torture_rows.trials import LIMIT, flipped, forked


def swept(run: Trajectory, out: Path, workers: int = 0) -> xr.Dataset:
    """Head by head at every fourth step."""
    contrasts = dy.tasks.load(run.config).contrasts()
    return dy.sweep(
        dy.patch_gradients,
        run,
        [12, 14, 16],
        contrasts,
        sites.heads,
        measures.correct_logit,
        out=out,
        workers=workers,
    )


def killed(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """A sweep killed, a shard damaged, then run again: Dataset identical to the undisturbed one"""
    run = dy.training.fit(TINY, folder / "run")
    whole = swept(run, folder / "whole")
    for trial in range(n):
        out = folder / f"out-{trial}"
        forked(lambda out=out: str(swept(run, out)), kill_after=float(rng.uniform(0.05, 1.0)))  # type: ignore[misc]
        for shard in sorted((out / "shards").glob("*.h5"))[:1]:
            shard.write_bytes(flipped(shard.read_bytes(), rng))
        yield "identical" if swept(run, out).identical(whole) else "BROKEN: another Dataset"


def clusters(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """A worker, the scheduler, or all processes of a sweep killed; two sweeps in a folder: the serial Dataset"""
    run = dy.training.fit(TINY, folder / "run")
    whole = swept(run, folder / "whole")
    for trial in range(n):
        what = ("the scheduler", "a worker", "all")[trial % 3]  # in turn
        out = folder / f"{what}-{trial}"
        yield ended(run, out, what, float(rng.uniform(0.5, 6.0)))
        same = swept(run, out).identical(whole)
        yield f"identical after {what} was killed" if same else f"BROKEN: {what}: another Dataset"
        out, context = folder / f"both-{trial}", multiprocessing.get_context("fork")
        other = context.Process(target=swept, args=(run, out))
        other.start()
        same = swept(run, out).identical(whole)
        other.join()
        same &= other.exitcode == 0 and swept(run, out).identical(whole)
        yield "identical beside another in its folder" if same else "BROKEN: two sweeps in a folder"


def ended(run: Trajectory, out: Path, what: str, after: float) -> str:
    """Start a sweep with two workers, kill some of its processes; whether the others end too."""

    def work() -> None:
        os.setsid()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        swept(run, out, workers=2)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    time.sleep(after)
    group = members(process.pid or 0)
    victims = {"the scheduler": [process.pid or 0], "all": group, "a worker": group[-1:]}[what]
    for victim in victims:
        if victim in group:
            os.kill(victim, signal.SIGKILL)
    process.join(LIMIT)
    until = time.monotonic() + LIMIT
    while members(process.pid or 0) and time.monotonic() < until:
        time.sleep(0.05)
    left = members(process.pid or 0)
    for each in left:
        os.kill(each, signal.SIGKILL)
    if left:
        return f"BROKEN: {what} was killed and {len(left)} processes were left for {LIMIT:.0f} s"
    return "no process is left"


def members(session: int) -> list[int]:
    """The processes of a session that live, in the order of their numbers."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (path / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.name))
    return sorted(found)
