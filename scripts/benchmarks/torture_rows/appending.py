"""What an append to a trajectory costs, at first and after many."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from checkpoints import Checkpoint, TrajectoryWriter


def cost(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Appends of a linear layer's checkpoint: the last tenth writes no more than the first"""
    model, tenth = torch.nn.Linear(16, 16), max(1, n // 10)
    costs = []
    with TrajectoryWriter.create(folder, {}) as writer:
        for step in range(n):
            if step in (0, tenth, n - tenth):
                costs.append(spent())
            writer.append(Checkpoint.capture(model, step=step))
        costs.append(spent())
    written, seconds, clock = (np.array(column) for column in zip(*costs, strict=True))
    for name, begin, end in (("first", 0, 1), ("last", 2, 3)):
        yield (
            f"{name} {tenth:,} of {n:,}: {(written[end] - written[begin]) / 1e6:.1f} MB written, "
            f"{seconds[end] - seconds[begin]:.1f} s CPU, {clock[end] - clock[begin]:.1f} s"
        )
    if written[3] - written[2] > 1.05 * (written[1] - written[0]) + 100_000:
        yield "BROKEN: the last write more than the first"


def spent() -> tuple[int, float, float]:
    """Bytes that this process has written, its seconds of CPU time, and the clock's."""
    counters = Path(f"/proc/{os.getpid()}/io").read_text().split()
    return int(counters[counters.index("wchar:") + 1]), time.process_time(), time.perf_counter()
