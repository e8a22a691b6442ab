"""The forward activations and backward signals of one run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from checkpoints import Checkpoint
from checkpoints.rng import replayed
from dynamics import sites
from dynamics.models.functional import is_bridge
from dynamics.recipe import Recipe
from dynamics.steps.gradients import NonFiniteGradient, StepGradient, gradient
from dynamics.steps.states import check_bridge, starting_point
from dynamics.steps.taps import Cache, reading


def cache(recipe: Recipe, checkpoint: Checkpoint | None, batch: Any, pattern: str = "*") -> Cache:
    """Forward activations and backward signals dL/da of one run, by hook name.

    Args:
        recipe: model and loss, which may be any scalar of a run, such as a measure's mean; neither is changed.
        checkpoint: whose parameters, buffers and random numbers are used; None takes the model as it stands, a
            TransformerBridge always.
        batch: what the loss eats.
        pattern: glob of the submodules that are kept; `sites.hooks(model)` lists them.

    Returns:
        `Cache` with `activations` and `signals`; a module that ran several times has further entries
        `name[1]`, `name[2]`. Of an output with several tensors the first is kept.

    Raises:
        SiteError: no submodule matches.
        NonFiniteGradient: the loss or a gradient is NaN or infinite.
        RecipeError: a checkpoint is given for a bridge, or one of another model.
    """
    hooks = sites.hooks(recipe.model, pattern)
    if is_bridge(recipe.model):
        return _of_bridge(recipe, checkpoint, batch, hooks)
    return recorded(recipe, starting_point(recipe, checkpoint), batch, hooks)[1]


def recorded(
    recipe: Recipe, checkpoint: Checkpoint, batch: Any, hooks: Iterable[str], where: str = "the batch"
) -> tuple[StepGradient, Cache]:
    """The gradient of a batch, and what passed the given submodules."""
    kept = Cache()
    return gradient(recipe, checkpoint, batch, where, reading(hooks, kept)), kept


def _of_bridge(recipe: Recipe, checkpoint: Checkpoint | None, batch: Any, hooks: Iterable[str]) -> Cache:
    """The same of a bridge, which is called as it stands."""
    check_bridge(recipe.model, checkpoint)
    kept = Cache()
    taps = reading(hooks, kept)
    with replayed(None), torch.enable_grad(), taps.attached(recipe.model):
        loss = recipe.require_loss()(recipe.model, batch)
        taps.forward_is_over()
        trained = [p for p in recipe.model.parameters() if p.requires_grad]
        torch.autograd.grad(loss, [*trained, *taps.leaves], allow_unused=True)
    if not bool(torch.isfinite(loss)):
        raise NonFiniteGradient(f"The loss of the batch is {loss.item()}.")
    return kept
