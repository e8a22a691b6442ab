"""Trials in processes of their own, with a limit of time: what comes of each, in a few words."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import dynamics as dy
from checkpoints import TrajectoryError

LIMIT = 120.0
"""Seconds after which a trial counts as hanging."""


def forked(work: Callable[[], str], kill_after: float | None = None, limit: float = LIMIT) -> str:
    """What `work` returns in a forked process; "killed" where it was; a crash or a hang as a broken promise."""
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        try:
            sending.send(work())
        except Exception as error:  # noqa: BLE001  (it is told where trials are counted)
            sending.send(f"BROKEN: {type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    sending.close()
    told = receiving.poll(limit if kill_after is None else kill_after)  # also where it died without a word
    try:
        outcome = str(receiving.recv()) if told else ""
    except EOFError:
        outcome = ""
    if not told:
        process.kill()
    process.join()
    if not told:
        return "killed" if kill_after is not None else f"BROKEN: hung for {limit:.0f} s"
    code = process.exitcode or 0
    silent = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"left with {code}"
    return outcome or f"BROKEN: {silent}"


def refused(work: Callable[[], object], path: Path) -> str:
    """How a read of a damaged or hostile file ends: with the toolkit's own error that names the file, or broken."""
    began = time.perf_counter()
    try:
        work()
    except (TrajectoryError, dy.results.ResultsError) as error:
        if path.name not in str(error):
            return f"BROKEN: {path.name} is not named by {error}"
        return (
            "refused by name"
            if time.perf_counter() - began < 1
            else f"BROKEN: {time.perf_counter() - began:.1f} s"
        )
    except Exception as error:  # noqa: BLE001  (any other error is what is looked for)
        return f"BROKEN: {type(error).__name__} instead of the readable error: {error}"
    return "BROKEN: silent"


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one bit flipped."""
    damaged = bytearray(data)
    damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)
