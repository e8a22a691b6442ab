"""patch_gradients: take the base step with the source's gradient on one site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import xarray as xr

from checkpoints import Checkpoint
from dynamics.engine.factor_crossing import Corners
from dynamics.engine.mixtures import selections
from dynamics.engine.runs import Beside, Runs, experiment, references, stepped
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check
from dynamics.steps import StepGradient
from dynamics.steps.stacks import Stack
from dynamics.trees import exchanged


def patch_gradients(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
) -> xr.Dataset:
    """Take each contrast's base step with the source step's gradient on one site at a time.

    θ^S = step(clip(g_base outside S, g_source on S)). The clip norm is recomputed for every site, so where
    clipping is active an exchange at S slightly scales the step everywhere: the true step.

    Args:
        recipe: how a step is taken; its model is not modified.
        checkpoint: state before the step; None takes the recipe's model as it stands and a new optimizer.
        contrasts: pairs of training batches and the probe they are measured on, length n_examples.
        sites: parameter slices, length n_sites; each is patched alone. Of a site with positions
            (`sites.at_positions`) only what those positions contribute to the gradient is exchanged.
        measure: (model, probe) -> scalar or [rows], rows are averaged; or a dict of those, which becomes
            the dim `measure`.

    Returns:
        `patched`, `effect` (patched − base) [example, site] and the references `base`, `source`,
        `untouched` (no step), `coasted` (a zero gradient) [example], in the measure's units.

    Raises:
        SiteError: a site covers what the model does not have.
        NonFiniteGradient: a loss or gradient is not finite; names the contrast and the parameter.
        RecipeError: the recipe has no loss or no optimizer.

    Source: the seed's gradient patching; the step as in Loshchilov & Hutter 2019 (AdamW).
    """
    check(sites, recipe.model)
    return experiment("patch_gradients", recipe, checkpoint, contrasts, sites, measure, _outcomes)


def _outcomes(runs: Runs, sites: Sequence[Site]) -> Iterator[Stack | Beside]:
    whole = all(site.positions is None for site in sites)
    if whole and runs.steps.separable(runs.base.gradients, runs.source.gradients):
        return selections(runs, sites)
    return chain(references(runs), stepped(runs, patched(runs, sites)))


def patched(runs: Runs, sites: Sequence[Site]) -> Iterator[StepGradient]:
    """The base run's gradient and buffers with the source run's on each site."""
    located = [site for site in sites if site.positions is not None]
    corners = Corners(runs, located) if located else None
    for site in sites:
        if corners and site.positions is not None:
            source = corners.gradient("source", "source", site.positions)
        else:
            source = runs.source.gradients
        yield replace(
            runs.base,
            gradients=exchanged(runs.base.gradients, source, site.covers),
            buffers=exchanged(runs.base.buffers, runs.source.buffers, site.covers),  # type: ignore[arg-type]
        )
