"""interactions: how much more, or less, two sites do together than each alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import xarray as xr

from checkpoints import Checkpoint, CheckpointPair
from dynamics.engine.exclusive import exclusive
from dynamics.measures import Measure
from dynamics.patching.gradients import patch_gradients
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, union

Verb = Callable[..., xr.Dataset]


@exclusive
def interactions(
    recipe: Recipe,
    checkpoint: Checkpoint | CheckpointPair | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    verb: Verb = patch_gradients,
) -> xr.Dataset:
    """How much more, or less, two sites do together than each alone: effect(S ∪ T) − effect(S) − effect(T).

    Args:
        recipe, checkpoint, contrasts, sites, measure: as `patch_gradients`; n_sites (n_sites + 1) / 2 steps
            are taken for each contrast.
        verb: `patch_gradients` or `patch_updates`; of a pair of checkpoints `patch_parameters`.

    Returns:
        What the verb returns for the sites, and `interaction` [example, site, other], symmetric, zero on the
        diagonal.
    """
    pairs = list(combinations(range(len(sites)), 2))
    unions = [union(recipe.model, [sites[i], sites[j]], f"together {i}, {j}") for i, j in pairs]
    found = verb(recipe, checkpoint, contrasts, [*sites, *unions], measure)
    effect = found["effect"].values
    n = len(sites)
    interaction = np.zeros((*effect.shape[:-1], n, n))
    for place, (i, j) in enumerate(pairs, start=n):
        interaction[..., i, j] = interaction[..., j, i] = effect[..., place] - effect[..., i] - effect[..., j]
    singles = found.isel(site=slice(n))
    labelled = singles["effect"].dims, interaction, {**found["effect"].attrs, "long_name": "interaction"}
    return singles.assign(interaction=((*labelled[0], "other"), *labelled[1:])).assign_coords(
        other=("other", [site.label for site in sites])
    )
