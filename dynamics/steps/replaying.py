"""Replaying recorded training: the same step again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from checkpoints import Checkpoint, Trajectory
from dynamics.recipe import ByNorm, ByValue, Recipe
from dynamics.steps.states import restored_copy


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
    loss_of = recipe.require_loss()
    model, optimizer, scheduler = restored_copy(recipe, checkpoint)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with checkpoint.random_state(), _deterministic(checkpoint), torch.enable_grad():
        for current in range(checkpoint.step, step):
            optimizer.zero_grad()
            loss_of(model, batch_of(current)).backward()  # type: ignore[no-untyped-call]
            if isinstance(recipe.clip, ByNorm):
                torch.nn.utils.clip_grad_norm_(parameters, recipe.clip.max_norm)
            elif isinstance(recipe.clip, ByValue):
                torch.nn.utils.clip_grad_value_(parameters, recipe.clip.limit)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return Checkpoint.capture(model, optimizer, scheduler, step)


@contextmanager
def _deterministic(checkpoint: Checkpoint) -> Iterator[None]:
    """Deterministic kernels inside if the run was recorded with them; the caller's setting afterwards."""
    before = torch.get_deterministic_debug_mode()
    try:
        torch.use_deterministic_algorithms(checkpoint.fingerprint.get("deterministic") == "True")
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
