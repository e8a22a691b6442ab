"""Verifying a run of a task by replaying all of its steps; `Trajectory.verify` checks its files."""

from __future__ import annotations

from collections.abc import Iterator

from checkpoints import Trajectory
from dynamics import steps, tasks
from dynamics.steps import Verdict


def verify(trajectory: Trajectory) -> Iterator[Verdict]:
    """Replay every pair of neighbouring checkpoints of a task's run and compare, bit for bit: `steps.verify`.

    Raises:
        ConfigError: the run's config names no task; `steps.verify` takes the recipe and the batches.
    """
    task = tasks.load(trajectory.config)
    yield from steps.verify(task.recipe(), trajectory, task.batch)
