"""Sites that act together: pairwise interactions, and Shapley values over all coalitions of a few."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np
import xarray as xr

from checkpoints import Checkpoint
from dynamics.measures import Measure
from dynamics.patching.gradients import patch_gradients
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, SiteError, union

Verb = Callable[..., xr.Dataset]

MOST_GROUPS = 8
"""Groups of sites whose Shapley values are computed: each has a step for every coalition, 2⁸ in all."""


def interactions(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    verb: Verb = patch_gradients,
) -> xr.Dataset:
    """How much more, or less, two sites do together than each alone: effect(S ∪ T) − effect(S) − effect(T).

    Args:
        recipe, checkpoint, contrasts, sites, measure: as `patch_gradients`; n_sites (n_sites + 1) / 2 steps
            are taken for each contrast.
        verb: `patch_gradients` or `patch_updates`.

    Returns:
        What the verb returns for the sites, and `interaction` [example, site, other], symmetric, zero on the
        diagonal.
    """
    pairs = list(combinations(range(len(sites)), 2))
    unions = [union(recipe.model, [sites[i], sites[j]], f"coalition {i}, {j}") for i, j in pairs]
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


def shapley_values(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    verb: Verb = patch_gradients,
) -> xr.Dataset:
    """Divide the effect of all sites together among them: each one's mean gain over all orders of patching.

    φ_S = Σ over coalitions C without S of [effect(C ∪ S) − effect(C)] / (n · binom(n − 1, |C|)), exactly.

    Args:
        recipe, checkpoint, contrasts, measure: as `patch_gradients`.
        sites: 1 to 8 groups; 2^n − 1 steps are taken for each contrast.
        verb: `patch_gradients` or `patch_updates`.

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
    coalitions = [c for size in range(1, n + 1) for c in combinations(range(n), size)]
    unions = [
        union(recipe.model, [sites[i] for i in c], f"coalition {c}") if len(c) > 1 else sites[c[0]]
        for c in coalitions
    ]
    found = verb(recipe, checkpoint, contrasts, unions, measure)
    effect = {c: found["effect"].values[..., place] for place, c in enumerate(coalitions)}
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
