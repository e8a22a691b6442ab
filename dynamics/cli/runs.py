"""Runs that commands are given: opened, known to be trained here, computed with as many threads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoints import Trajectory


def open_trained(folder: Path, why: str) -> Trajectory:
    """The run in a folder, whose steps can be taken again.

    Raises:
        TrajectoryError: there is none, or it was imported; `why` says what would have needed its training.
    """
    from checkpoints import Trajectory, TrajectoryError

    trajectory = Trajectory.open(folder)
    if "imported" in trajectory.provenance:
        raise TrajectoryError(f"{folder} was imported; {why} a run of dynamics study or fit.")
    return trajectory


def set_threads(threads: int) -> None:
    """Compute with so many threads, which is part of what bits depend on."""
    import torch

    torch.set_num_threads(threads)


def set_threads_of(trajectory: Trajectory) -> None:
    """Compute with as many threads as a run was trained with."""
    set_threads(int(trajectory.last.fingerprint["threads"]))
