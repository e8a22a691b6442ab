"""How much two steps differ, over several contrasts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from checkpoints import Checkpoint
from dynamics.recipe import Contrast, Recipe
from dynamics.steps.gradients import gradient
from dynamics.steps.states import starting_point
from dynamics.steps.update import steps_from


def update_difference(
    recipe: Recipe, checkpoint: Checkpoint | None, contrasts: Sequence[Contrast]
) -> dict[str, Tensor]:
    """Δ = source update − base update, element by element, as its root mean square over contrasts.

    Args:
        recipe, checkpoint, contrasts: as `patch_updates`.

    Returns:
        By parameter name, shapes as in the model, ≥ 0; for a single contrast |Δ|.
    """
    state = starting_point(recipe, checkpoint)
    total = {name: torch.zeros_like(p) for name, p in state.parameters.items()}
    for contrast in contrasts:
        gradients = [gradient(recipe, state, b).gradients for b in (contrast.base, contrast.source)]
        base, source = steps_from(recipe, state, gradients)
        for name in total:
            total[name] += (source[name] - base[name]).square()
    return {name: (square / len(contrasts)).sqrt() for name, square in total.items()}
