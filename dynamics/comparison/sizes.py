"""How large one training step is, site by site: gradient, clipping, update, and Adam's effective step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics import results
from dynamics.comparison.tables import (
    Products,
    differences,
    labelled,
    presented,
)
from dynamics.recipe import ByNorm, Recipe
from dynamics.results.labels import site_columns
from dynamics.sites import Site, check, check_whole
from dynamics.steps import gradient, steps_from
from dynamics.steps.clipping import coefficient, counted
from dynamics.steps.states import held_names, restored_copy, starting_point
from dynamics.trees import squared_norm


def step_sizes(
    recipe: Recipe, checkpoint: Checkpoint | None, batch: Any, sites: Sequence[Site]
) -> xr.Dataset:
    """Sizes of the step that a batch would take from a checkpoint, with its own optimizer state.

    Args:
        recipe: how the step is taken; nothing of it is changed.
        checkpoint: state before the step; None takes the model as it stands, optimizer new.
        batch: what the loss eats, such as `task.batch(step)`.
        sites: parts of the parameters, length n_sites.

    Returns:
        [site]: `gradient_norm` before clipping; `share`, the site's share of the whole squared norm that clipping
        by norm compares with its limit; `update_norm` ‖Δθ‖, decay included; `relative_update` ‖Δθ‖ / ‖θ‖;
        `effective_step`, Adam's own learning rate η / (√v̂ + ε) as its geometric mean over the site's elements (an
        element that never had a gradient has η / ε, which would make up any other mean; NaN without second moments:
        a new optimizer, or another kind).
        Without a dim: `total_norm` of the gradient that clipping counts (without clipping, the optimizer's) and
        `clip`, the factor min(1, τ / N) it is scaled by (1 where nothing is clipped by norm).

    Raises:
        SiteError: a site covers what the model does not have, or positions.
        NonFiniteGradient, RecipeError: as `patch_gradients`.

    Source: Adam, Kingma & Ba 2015, algorithm 1.
    """
    check(sites, recipe.model)
    check_whole(sites, "step_sizes", "leave them out, as sites.heads(model) does")
    state = starting_point(recipe, checkpoint)
    step = gradient(recipe, state, batch)
    (after,) = steps_from(recipe, state, [step.gradients])
    weights = state.parameters
    products = Products(sites, weights)
    gradients, update = presented(step.gradients, weights), differences(after, weights)
    squares, norms = products(gradients, gradients), products(weights, weights)
    model, optimizer, _ = restored_copy(recipe, state)
    limit = recipe.clip if isinstance(recipe.clip, ByNorm) else ByNorm(math.inf, over="optimizer")
    total = sum(map(squared_norm, counted(step.gradients, limit, held_names(model, optimizer))))
    moved = np.sqrt(products(update, update))
    rates = {name: torch.full_like(w, float("nan"), dtype=torch.float64) for name, w in weights.items()}
    rates |= {name: rate.log() for name, rate in _effective(state, optimizer.defaults).items()}
    ones = {name: torch.ones_like(w, dtype=torch.float64) for name, w in weights.items()}
    variables: dict[str, tuple[Any, str, str]] = {
        "gradient_norm": (np.sqrt(squares), "‖g‖ before clipping", "1"),
        "share": (squares / total if total else squares * np.nan, "share of the squared norm", "share"),
        "update_norm": (moved, "‖Δθ‖", "1"),
        "relative_update": (
            np.divide(moved, np.sqrt(norms), out=np.full(moved.shape, np.nan), where=norms > 0),
            "‖Δθ‖ / ‖θ‖",
            "1",
        ),
        "effective_step": (
            np.exp(products(rates, ones) / products(ones, ones)),
            "geometric mean of η / (√v̂ + ε)",
            "1",
        ),
        "total_norm": (total**0.5, "‖g‖ that clipping counts", "1"),
        "clip": (
            coefficient(total, limit.max_norm),
            "factor of clipping by norm",
            "1",
        ),
    }
    return labelled(
        "site", site_columns(sites), variables, results.provenance(quantity="step", step=state.step)
    )


def _effective(state: Checkpoint, defaults: Mapping[str, Any]) -> dict[str, Tensor]:
    """η / (√v̂ + ε) of every element, by name, of the parameters that have Adam's second moments."""
    found: dict[str, Tensor] = {}
    if state.optimizer is None:
        return found
    for group in state.optimizer.groups:
        settings = {**defaults, **group}
        for name in group["params"]:
            kept = state.optimizer.state.get(name, {})
            second = kept.get("max_exp_avg_sq", kept.get("exp_avg_sq"))
            if second is not None and float(kept["step"]) > 0:
                corrected = second.double() / (1 - settings["betas"][1] ** float(kept["step"]))
                found[name] = float(settings["lr"]) / (corrected.sqrt() + settings["eps"])
    return found
