"""A recipe as a LightningModule."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from checkpoints import Checkpoint
from dynamics.recipe import Recipe


class NonFiniteLoss(ArithmeticError):
    """The training loss became NaN or infinite; training stopped before that step was taken."""


class StepModule(LightningModule):
    """Takes the recipe's steps from a checkpoint on; clipping is the Trainer's, as Lightning has it.

    Args:
        recipe: model, loss, optimizer, scheduler. Unlike a verb, training moves the recipe's own model.
        start: the state to go on from.
    """

    def __init__(self, recipe: Recipe, start: Checkpoint) -> None:
        super().__init__()
        self.model = recipe.model
        self.recipe = recipe
        self.start = start

    @property
    def step(self) -> int:
        """The number of the batch that comes next, counted over all phases."""
        return self.start.step + self.trainer.global_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The recipe's loss.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        loss = self.recipe.require_loss()(self.model, batch)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteLoss(
                f"The loss is {loss.item()} at step {self.step}. Training stopped before that step; the "
                "checkpoints up to it are kept. Lower the phase's learning_rate or lengthen its warmup."
            )
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer and scheduler, in the state of the start."""
        optimizer = self.recipe.build_optimizer(self.model.parameters())
        scheduler = self.recipe.build_scheduler(optimizer)
        self.start.restore(
            self.model,
            optimizer if self.start.optimizer else None,
            scheduler if self.start.scheduler else None,
        )
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
