"""TrajectoryRecorder: keeps checkpoints of any LightningModule while a Trainer fits it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from checkpoints import Checkpoint, TrajectoryWriter


class TrajectoryRecorder(Callback):
    """Appends the state before each of the given steps; the state training ends with counts as well.

    A step is one call of the optimizer; under gradient accumulation the state before its first batch
    counts. Nothing is changed in the module or the Trainer.

    Args:
        writer: where checkpoints go; the caller opens and closes it.
        steps: which steps are kept, as `checkpoints.schedule` makes them.
        start: the number of the Trainer's first step, where the run began earlier.
        model: whose names are recorded; None takes the LightningModule itself.
    """

    def __init__(
        self, writer: TrajectoryWriter, steps: Iterable[int], start: int = 0, model: nn.Module | None = None
    ) -> None:
        self.writer = writer
        self.steps = frozenset(steps)
        self.start = start
        self.model = model
        self._recorded: int | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the state before this step if it is one of those kept."""
        self._record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the final state if it is one of those kept."""
        self._record(trainer, pl_module)

    def capture(self, trainer: Trainer, pl_module: LightningModule) -> Checkpoint:
        """The state as it stands: a Trainer's first step begins a new optimizer."""
        schedulers = trainer.lr_scheduler_configs
        return Checkpoint.capture(
            pl_module if self.model is None else self.model,
            trainer.optimizers[0],
            schedulers[0].scheduler if schedulers else None,
            self.start + trainer.global_step,
            begins_optimizer=trainer.global_step == 0,
        )

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = self.start + trainer.global_step
        if step in self.steps and step != self._recorded:
            self.writer.append(self.capture(trainer, pl_module))
            self._recorded = step
