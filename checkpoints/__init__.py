"""Trajectories of training checkpoints, stored bit for bit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoints.checkpoint import Checkpoint
    from checkpoints.errors import TrajectoryError
    from checkpoints.optimizer import OptimizerState
    from checkpoints.pair import CheckpointPair
    from checkpoints.rng import RngState
    from checkpoints.schedule import every, log_spaced, union, window
    from checkpoints.trajectory import Trajectory
    from checkpoints.writer import TrajectoryWriter

__all__ = [
    "Checkpoint",
    "CheckpointPair",
    "OptimizerState",
    "RngState",
    "Trajectory",
    "TrajectoryError",
    "TrajectoryWriter",
    "every",
    "log_spaced",
    "union",
    "window",
]

_HOMES = {
    "Checkpoint": "checkpoint",
    "CheckpointPair": "pair",
    "OptimizerState": "optimizer",
    "RngState": "rng",
    "Trajectory": "trajectory",
    "TrajectoryError": "errors",
    "TrajectoryWriter": "writer",
    "every": "schedule",
    "log_spaced": "schedule",
    "union": "schedule",
    "window": "schedule",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import checkpoints` stays light."""
    if name not in _HOMES:
        raise AttributeError(
            f"module 'checkpoints' has no attribute {name!r}; it offers {', '.join(__all__)}"
        )
    return getattr(import_module(f"checkpoints.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
