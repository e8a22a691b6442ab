"""patch_parameters: exchange parameters between two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import numpy as np
import xarray as xr
from torch import Tensor

from checkpoints import CheckpointPair
from dynamics import measures
from dynamics.engine.arguments import check_pair_arguments, named, naming, probe_of
from dynamics.engine.exclusive import exclusive
from dynamics.engine.measuring import Measuring
from dynamics.engine.mixtures import in_model_order, mixtures
from dynamics.engine.positionwise_layers import PositionwiseCall, located
from dynamics.engine.progress import progress_bar
from dynamics.engine.runs import Variants, fill
from dynamics.engine.stack_memory import HALF, chunks, models_per_stack
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import Labels
from dynamics.sites import Site, check
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.stacks import Stack, Workspace, stack
from dynamics.steps.states import starting_point


@exclusive
def patch_parameters(
    recipe: Recipe,
    pair: CheckpointPair,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
) -> xr.Dataset:
    """Put another checkpoint's parameters into a model, one site at a time, and measure it (weight patching).

        θ^S = θ_source on S, θ_base elsewhere: a selection, so everything exchanged is the source, to the bit.

    Of a site with positions (`sites.at_positions`) the source's layer acts at those positions P alone, on what it
    reads in this very pass: y[p] = W_base x[p] + 1[p ∈ P] (W_source − W_base) x[p]. At all positions that is the
    whole layer.

    A later source into an earlier base asks what suffices, `pair.reversed()` what is necessary.

    Args:
        recipe: its model, which is not changed; loss and optimizer play no part.
        pair: base and source checkpoint, of one run or of two. Measures draw the base checkpoint's random numbers.
        contrasts: what is measured, length n_examples: each one's `probe`, or its `base` where it has none. A base
            alone will do: `Contrast(batch)`. Sources play no part.
        sites: slices of parameters or buffers, length n_sites; each is exchanged alone. Buffers that no site covers
            are the base's.
        measure: (model, batch) -> scalar or [rows], rows are averaged; or a dict of those, which becomes the dim
            `measure`.

    Returns:
        `patched`, `effect` (patched − base) [example, site] and the references `base`, `source` [example], the two
        whole models, in the measure's units.

    Raises:
        SiteError: a site covers what the model does not have, or means positions of a layer that mixes them.
        RecipeError: the checkpoints are of another model.
    """
    check_pair_arguments("patch_parameters", recipe, pair, contrasts, sites, measure)
    check(sites, recipe.model)
    return in_model_order(recipe.model, sites, partial(_patch, recipe, pair, contrasts, measure))


def _patch(
    recipe: Recipe,
    pair: CheckpointPair,
    contrasts: Sequence[Contrast],
    measure: Measure | Mapping[str, Measure],
    sites: Sequence[Site],
) -> xr.Dataset:
    """All of it, for sites in the model's order, those with positions last."""
    state, other = (starting_point(recipe, checkpoint) for checkpoint in (pair.base, pair.source))
    base, source = ({**c.parameters, **c.buffers} for c in (state, other))
    by_name, paths, space = measures.named(measure), ComputePaths("patch_parameters"), Workspace()
    call = PositionwiseCall([site for site in sites if site.positions is not None])
    measuring = Measuring(recipe, state, by_name, paths, call)
    values = np.full((len(contrasts), 2 + len(sites), len(by_name)), np.nan)
    if call.sites:
        with naming(named(contrasts, 0)):
            call.check(measuring, base, source, probe_of(contrasts[0]))
    with progress_bar("patch_parameters", values[..., 0].size, "model") as bar:
        for i, contrast in enumerate(contrasts):
            with naming(named(contrasts, i)):
                models = _models(base, source, sites, space)
                fill([values[i]], [probe_of(contrast)], measuring, models, 0, bar)
    settings = {"source_step": other.step, "paths": paths.facts()}
    labels = Labels(measure, contrasts, "patch_parameters", state.step, settings)
    by_measure = np.moveaxis(values, 2, 0)
    references = {name: by_measure[..., i] for i, name in enumerate(("base", "source"))}
    return labels.effects(by_measure[..., 2:], references, sites)


def _models(
    base: Mapping[str, Tensor], source: Mapping[str, Tensor], sites: Sequence[Site], space: Workspace
) -> Iterator[Stack | Variants]:
    """Base, source, and the base with the source on one site at a time."""
    n_whole = sum(site.positions is None for site in sites)
    whole, placed = sites[:n_whole], sites[n_whole:]
    return chain(
        map(stack, chunks([base, source], models_per_stack(base.values(), HALF))),
        mixtures(base, source, whole, space),
        located(mixtures(base, source, placed, space), base, placed),
    )
