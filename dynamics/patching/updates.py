"""patch_updates: exchange finished parameter updates, after clipping and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from checkpoints import Checkpoint
from dynamics.measures import Measure
from dynamics.patching.experiment import Outcome, Runs, experiment, own, stepped
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check, check_whole
from dynamics.trees import exchanged


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
    check(sites, recipe.model)
    check_whole(sites, "patch_updates", "a finished update has none; use patch_gradients")
    return experiment("patch_updates", recipe, checkpoint, contrasts, sites, measure, _outcomes)


def _outcomes(runs: Runs, sites: Sequence[Site]) -> Iterator[Outcome]:
    base, source, coasted = stepped(runs, (runs.base, runs.source, runs.coasting))
    yield own(base)
    yield own(source)
    yield coasted
    for site in sites:
        yield own(exchanged(base, source, site.covers))  # type: ignore[arg-type]
