"""Several processes at one run: a reader beside a writer, a second writer, locks that are stale or missing."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from checkpoints import Trajectory, TrajectoryError, TrajectoryWriter
from scripts.benchmarks.torture_rows.recordings import a_run, opened, record, state
from scripts.benchmarks.torture_rows.trials import forked


def beside(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """A second writer, and a reader beside a writer: refused in words, no wrong read"""
    TrajectoryWriter.create(folder, {}).close()
    process = multiprocessing.get_context("fork").Process(target=record, args=(folder,))
    process.start()
    try:
        while not (folder / "finished").exists():
            time.sleep(0.01)
        for _ in range(n):
            run = Trajectory.open(folder)
            step = int(rng.choice(run.steps))
            right = float(run.at(step).parameters["w"][3]) == step and run.steps == tuple(range(len(run)))
            yield "read right" if right else "BROKEN: a wrong read"
        try:
            TrajectoryWriter.resume(folder)
            yield "BROKEN: two writers"
        except TrajectoryError as error:
            yield "refused in words" if "is being written by process" in str(error) else f"BROKEN: {error}"
    finally:
        process.kill()
        process.join()


def locks(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """A stale lock, a folder without locks (NFS): the first is taken over, of the second the log tells"""

    def without_locks(run: Path, number: int) -> str:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        told: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("checkpoints").addHandler(handler)
        fcntl.flock = flock
        with TrajectoryWriter.resume(run) as writer:
            writer.append(state(len(writer.steps)))
        if not any("has no locks" in line and str(run) in line for line in told):
            return "BROKEN: the log does not tell"
        return opened(run, 3).replace("opens whole", "written without locks, as the log says")

    for trial in range(n):
        run = a_run(folder / f"run-{trial}")
        (run / ".writer.lock").write_text(f"process {int(rng.integers(1 << 22))} on a machine that is gone")
        with TrajectoryWriter.resume(run) as writer:
            yield "a stale lock was taken over" if writer.steps == (0, 1, 2) else "BROKEN: other steps"
        for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            yield forked(partial(without_locks, a_run(folder / f"nfs-{trial}-{number}"), number))
