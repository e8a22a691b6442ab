"""Training a study's run with Lightning, and recording trajectories of Lightning's and Hugging Face's Trainers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynamics.training.module import NonFiniteLoss as NonFiniteLoss
from dynamics.training.module import StepModule as StepModule
from dynamics.training.recorder import TrajectoryRecorder as TrajectoryRecorder
from dynamics.training.runs import RunError as RunError
from dynamics.training.runs import fit as fit
from dynamics.training.runs import kept_steps as kept_steps

if TYPE_CHECKING:
    from dynamics.training.hugging_face import HuggingFaceRecorder as HuggingFaceRecorder
    from dynamics.training.hugging_face import batches_of as batches_of


def __getattr__(name: str) -> Any:
    """What needs transformers, imported when it is first used."""
    if name in ("HuggingFaceRecorder", "batches_of"):
        return getattr(import_module("dynamics.training.hugging_face"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
