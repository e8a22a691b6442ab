"""Sufficiency and necessity side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import xarray as xr

from checkpoints import Checkpoint
from dynamics import results
from dynamics.engine.exclusive import exclusive
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site


@exclusive
def both_directions(
    verb: Callable[..., xr.Dataset],
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
) -> xr.Dataset:
    """A verb on the contrasts as they are (sufficiency) and reversed (necessity), along a dim `direction`.

    Sufficiency: the base run, with the site from the source. Necessity: the source run, with the site from the
    base; its `base` is the contrast's source, so recovery reads the same way in both. Where sites do not
    interact the two effects differ only in sign.
    """
    reversed_contrasts = [contrast.reversed() for contrast in contrasts]
    parts = [verb(recipe, checkpoint, which, sites, measure) for which in (contrasts, reversed_contrasts)]
    return results.concat(parts, "direction", ["sufficiency", "necessity"])
