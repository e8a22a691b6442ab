"""Replaying recorded training: the same step again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from checkpoints import Checkpoint, Trajectory
from dynamics.recipe import ByNorm, ByValue, Recipe
from dynamics.steps.clipping import coefficient
from dynamics.steps.states import assign_rates, coasts, restored_copy


def replay(recipe: Recipe, checkpoint: Checkpoint, batch: Any) -> Checkpoint:
    """The checkpoint one step later, as training itself would have left it.

    Takes the ordinary step on a copy of the model: loss, backward, torch's own clipping, the recipe's
    optimizer and scheduler. Bitwise equal to training where the numeric fingerprint is the same.
    """
    return advance(recipe, checkpoint, checkpoint.step + 1, lambda _: batch)


def reach(recipe: Recipe, trajectory: Trajectory, step: int, batch_of: Callable[[int], Any]) -> Checkpoint:
    """The checkpoint of any step, by replaying forward from the nearest stored one before it.

    Args:
        recipe: how the run was trained.
        trajectory: its stored checkpoints.
        step: the step whose state is wanted.
        batch_of: the training batch of a step, such as `task.batch`.
    """
    return advance(recipe, trajectory.before(step), step, batch_of)


def advance(recipe: Recipe, checkpoint: Checkpoint, step: int, batch_of: Callable[[int], Any]) -> Checkpoint:
    """The checkpoint of a later step, by replaying every step from this one on."""
    if step == checkpoint.step:
        return checkpoint
    if step < checkpoint.step:
        raise ValueError(
            f"step {step} lies before checkpoint {checkpoint.step}; replaying only goes forward."
        )
    with resumed(recipe, checkpoint) as loop:
        while loop.step < step:
            loop.take(batch_of(loop.step))
        return Checkpoint.capture(loop.model, loop.optimizer, loop.scheduler, loop.step, scaler=loop.scaler)


@dataclass
class TrainingLoop:
    """An ordinary training loop on a copy of the model: loss, backward, torch's own clipping, optimizer, scheduler.

    Attributes:
        recipe: how a step is taken.
        model, optimizer, scheduler: the loop's own.
        scaler: of the loss, in training with float16.
        step: steps taken since the run began.
        clipped_to: what clipping by norm multiplied the last step's gradient by; 1 where it did nothing.
    """

    recipe: Recipe
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    step: int
    scaler: GradScaler | None = None
    clipped_to: float = 1.0

    def take(
        self,
        batch: Any,
        before_optimizer: Callable[[], None] = lambda: None,
        after_optimizer: Callable[[], None] = lambda: None,
    ) -> None:
        """One step of training.

        Args:
            batch: what the loss eats.
            before_optimizer: called when gradients are clipped, before the optimizer's step.
            after_optimizer: called after it, when groups have their learning rates still.
        """
        recipe, optimizer, clip, scaler = self.recipe, self.optimizer, self.recipe.clip, self.scaler
        recipe.require_loss()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        with torch.enable_grad():
            assign_rates(recipe, optimizer.param_groups, self.step)
            self.model.zero_grad()
            for p in held:
                if coasts(recipe, p, optimizer.state, self.step):
                    p.grad = torch.zeros_like(p)
            for each in recipe.micro_batches(batch):
                loss = recipe.micro_loss(self.model, each)
                (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
            if scaler is not None:
                scaler.unscale_(optimizer)
            if isinstance(clip, ByNorm):
                counted = self.model.parameters() if clip.over == "model" else held
                norm = torch.nn.utils.clip_grad_norm_(counted, clip.max_norm)
                self.clipped_to = coefficient(float(norm) ** 2, clip.max_norm)
            elif isinstance(clip, ByValue):
                torch.nn.utils.clip_grad_value_(held, clip.limit)
            before_optimizer()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            after_optimizer()
            if self.scheduler is not None:
                self.scheduler.step()
        self.step += 1


@contextmanager
def resumed(recipe: Recipe, checkpoint: Checkpoint) -> Iterator[TrainingLoop]:
    """Training resumed at a checkpoint, with its random numbers and kernels; the caller's come back afterwards."""
    deterministic = checkpoint.fingerprint.get("deterministic") == "True"
    with checkpoint.random_state(), _deterministic(deterministic):
        scaler = recipe.scaler() if recipe.scaler else None
        if scaler is not None and checkpoint.scaler is not None:
            scaler.load_state_dict(checkpoint.scaler)
        loop = TrainingLoop(recipe, *restored_copy(recipe, checkpoint), checkpoint.step, scaler)
        del checkpoint  # the loop has copies of what is in it
        yield loop


@contextmanager
def _deterministic(deterministic: bool) -> Iterator[None]:
    """Deterministic kernels inside or not; the caller's setting afterwards."""
    before = torch.get_deterministic_debug_mode()
    try:
        torch.use_deterministic_algorithms(deterministic)
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
