"""patch_updates: exchange finished parameter updates, after clipping and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import xarray as xr

from checkpoints import Checkpoint
from dynamics.engine.arguments import check_step_arguments
from dynamics.engine.exclusive import exclusive
from dynamics.engine.mixtures import in_model_order, mixed_models
from dynamics.engine.runs import run_contrasts
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check, check_whole


@exclusive
def patch_updates(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
) -> xr.Dataset:
    """Give one site at a time the value it has after the source step, the rest that after the base step.

    θ^S = θ_source on S, θ_base elsewhere: a selection, so disjoint sites add up exactly and nothing is
    coupled through the clip norm.

    Args, Returns, Raises: as `patch_gradients`; a SiteError also for a site with positions, which a finished
    update does not have.
    """
    check_step_arguments("patch_updates", recipe, checkpoint, contrasts, sites, measure)
    check(sites, recipe.model)
    check_whole(sites, "patch_updates", "a finished update has none; use patch_gradients")
    return in_model_order(
        recipe.model,
        sites,
        lambda ordered: run_contrasts(
            "patch_updates", recipe, checkpoint, contrasts, ordered, measure, mixed_models
        ),
    )
