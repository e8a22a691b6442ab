"""shapley_values: divide the effect of a few sites together among them, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np
import xarray as xr

from checkpoints import Checkpoint, CheckpointPair
from dynamics.engine.exclusive import exclusive
from dynamics.measures import Measure
from dynamics.patching.gradients import patch_gradients
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, SiteError, union

Verb = Callable[..., xr.Dataset]

MOST_GROUPS = 8
"""Groups of sites whose Shapley values are computed: each has a step for every subset of them, 2⁸ in all."""


@exclusive
def shapley_values(
    recipe: Recipe,
    checkpoint: Checkpoint | CheckpointPair | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    verb: Verb = patch_gradients,
) -> xr.Dataset:
    """Divide the effect of all sites together among them: each one's mean gain over all orders of patching.

    φ_S = Σ over sets of sites C without S of [effect(C ∪ S) − effect(C)] / (n · binom(n − 1, |C|)), exactly.

    Args:
        recipe, checkpoint, contrasts, measure: as `patch_gradients`.
        sites: 1 to 8 groups; 2^n − 1 steps are taken for each contrast.
        verb: `patch_gradients` or `patch_updates`; of a pair of checkpoints `patch_parameters`.

    Returns:
        What the verb returns for the sites, `shapley` [example, site], and `together` [example], the effect of
        all of them, to which the Shapley values add up.

    Source: Shapley 1953.
    """
    n = len(sites)
    if n > MOST_GROUPS:
        raise SiteError(
            f"Shapley values of {n} sites take 2^{n} steps a contrast; give at most {MOST_GROUPS}, "
            "joined by sites.union(model, [...])."
        )
    subsets = [c for size in range(1, n + 1) for c in combinations(range(n), size)]
    unions = [
        union(recipe.model, [sites[i] for i in c], f"together {c}") if len(c) > 1 else sites[c[0]]
        for c in subsets
    ]
    found = verb(recipe, checkpoint, contrasts, unions, measure)
    effect = {c: found["effect"].values[..., place] for place, c in enumerate(subsets)}
    effect[()] = np.zeros_like(effect[(0,)])
    shares = np.zeros((*found["effect"].shape[:-1], n))
    for without in (c for c in effect if len(c) < n):
        for i in set(range(n)) - set(without):
            gain = effect[tuple(sorted((*without, i)))] - effect[without]
            shares[..., i] += gain / (n * comb(n - 1, len(without)))
    dims, attrs = found["effect"].dims, found["effect"].attrs
    return found.isel(site=slice(n)).assign(
        shapley=(dims, shares, {**attrs, "long_name": "Shapley value"}),
        together=(dims[:-1], effect[tuple(range(n))], {**attrs, "long_name": "effect of all sites together"}),
    )
