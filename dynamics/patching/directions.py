"""Sufficiency and necessity side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import xarray as xr

from checkpoints import Checkpoint, CheckpointPair
from dynamics import results
from dynamics.engine.arguments import probe_of
from dynamics.engine.exclusive import exclusive
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site


@exclusive
def both_directions(
    verb: Callable[..., xr.Dataset],
    recipe: Recipe,
    checkpoint: Checkpoint | CheckpointPair | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
) -> xr.Dataset:
    """A verb on the contrasts as they are (sufficiency) and reversed (necessity), along a dim `direction`.

    Sufficiency: the base run, with the site from the source. Necessity: the source run, with the site from the
    base; its `base` is the contrast's source, so recovery reads the same way in both. Where sites do not
    interact the two effects differ only in sign. Of a `CheckpointPair` the checkpoints change places too, and what
    the parameters of both are measured on stays. `dy.statistics.antisymmetric` takes half their difference, free
    of what mixing two gradients does by itself.
    """
    turned = checkpoint
    if isinstance(checkpoint, CheckpointPair):
        turned = checkpoint.reversed()
        contrasts = [replace(contrast, probe=probe_of(contrast)) for contrast in contrasts]
    backwards = [contrast.reversed() for contrast in contrasts]
    ways = ((checkpoint, contrasts), (turned, backwards))
    parts = [verb(recipe, state, which, sites, measure) for state, which in ways]
    return results.concat(parts, "direction", ["sufficiency", "necessity"])
