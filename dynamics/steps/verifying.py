"""Verifying a recorded run: the steps between stored neighbours are taken again and compared, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from checkpoints import Checkpoint, Trajectory
from dynamics.recipe import Recipe
from dynamics.steps.replaying import advance


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


def verify(recipe: Recipe, run: Trajectory, batch_of: Callable[[int], Any]) -> Iterator[Verdict]:
    """Replay every pair of neighbouring checkpoints of a run and compare, bit for bit.

    Parameters, buffers, optimizer state, learning rates and the scheduler are compared. Where training began with
    a new optimizer, the replayed state drops its moments as training did.

    Bits are promised only where torch, the CPU's capability and the number of threads are those recorded
    in `checkpoint.fingerprint`; `environment_changes` says what differs.

    Args:
        recipe: how the run was trained; its model is not modified.
        run: its stored checkpoints.
        batch_of: the training batch of a step.

    Yields:
        One verdict for each pair of neighbours, in their order.

    Raises:
        RecipeError: the recipe does not fit the checkpoints.
        TrajectoryError: a file is damaged.
    """
    for start, stop in pairwise(run.steps):
        recorded = run.at(stop)
        replayed = advance(recipe, run.at(start), stop, batch_of)
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
