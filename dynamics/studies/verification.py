"""Verifying a run: its files by checksum, its stored neighbours by replaying the steps between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn

from checkpoints import Checkpoint, Trajectory
from dynamics import steps, tasks


@dataclass(frozen=True)
class Verdict:
    """What replaying from one stored checkpoint to the next showed.

    Attributes:
        start, stop: the two steps.
        differences: names of what is not bitwise equal; empty where everything is.
    """

    start: int
    stop: int
    differences: tuple[str, ...]


def verify(trajectory: Trajectory) -> Iterator[Verdict]:
    """Replay every pair of neighbouring checkpoints of an alias run and compare, bit for bit.

    Parameters, buffers, optimizer state, learning rates and the scheduler are compared. Where a phase
    begins with a new optimizer, the replayed state drops its moments as training did.

    Bits are promised only where torch, the CPU's capability and the number of threads are those recorded
    in `checkpoint.fingerprint`.
    """
    task = tasks.load(trajectory.config)
    recipe = task.recipe()
    for start, stop in pairwise(trajectory.steps):
        recorded = trajectory.at(stop)
        replayed = steps.advance(recipe, trajectory.at(start), stop, task.batch)
        if recorded.begins_optimizer:
            replayed = replace(replayed.with_fresh_optimizer(), begins_optimizer=True)
        yield Verdict(start, stop, tuple(recorded.differences(replayed)))


def environment_changes(recorded: Checkpoint) -> list[str]:
    """What of the numeric environment differs here from the recorded one, in words.

    Deterministic kernels are left out: replaying turns them on where the run had them.
    """
    here = Checkpoint.capture(nn.Module()).fingerprint
    return [
        f"{name} was {value}, here {here.get(name)}"
        for name, value in recorded.fingerprint.items()
        if here.get(name) != value and name != "deterministic"
    ]
