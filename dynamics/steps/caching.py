"""The forward activations and backward signals of one run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from checkpoints import Checkpoint
from dynamics import sites
from dynamics.recipe import Recipe
from dynamics.steps.gradients import StepGradient, gradient
from dynamics.steps.states import starting_point
from dynamics.steps.taps import Cache, reading


def cache(recipe: Recipe, checkpoint: Checkpoint | None, batch: Any, pattern: str = "*") -> Cache:
    """Forward activations and backward signals dL/da of one run, by hook name.

    Args:
        recipe: model and loss; neither is changed.
        checkpoint: whose parameters, buffers and random numbers are used; None takes the model as it stands.
        batch: what the loss eats.
        pattern: glob of the submodules that are kept; `sites.hooks(model)` lists them.

    Returns:
        `Cache` with `activations` and `signals`; a module that ran several times has further entries
        `name[1]`, `name[2]`. Of an output with several tensors the first is kept.

    Raises:
        SiteError: no submodule matches.
        NonFiniteGradient: the loss or a gradient is NaN or infinite.
    """
    hooks = sites.hooks(recipe.model, pattern)
    return recorded(recipe, starting_point(recipe, checkpoint), batch, hooks)[1]


def recorded(
    recipe: Recipe, checkpoint: Checkpoint, batch: Any, hooks: Iterable[str], where: str = "the batch"
) -> tuple[StepGradient, Cache]:
    """The gradient of a batch, and what passed the given submodules."""
    kept = Cache()
    return gradient(recipe, checkpoint, batch, where, reading(hooks, kept)), kept
