"""Training a study's run with Lightning, and recording the trajectory of any LightningModule."""

from dynamics.training.module import NonFiniteLoss as NonFiniteLoss
from dynamics.training.module import StepModule as StepModule
from dynamics.training.recorder import TrajectoryRecorder as TrajectoryRecorder
from dynamics.training.runs import RunError as RunError
from dynamics.training.runs import fit as fit
from dynamics.training.runs import kept_steps as kept_steps
