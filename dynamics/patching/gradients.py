"""patch_gradients: take the base step with the source's gradient on one site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import xarray as xr

from checkpoints import Checkpoint
from dynamics.engine.arguments import check_step_arguments
from dynamics.engine.exchanged_gradients import patched_gradients
from dynamics.engine.exclusive import exclusive
from dynamics.engine.mixtures import mixed_models
from dynamics.engine.runs import Runs, Variants, reference_models_trimmed, run_contrasts, stepped_variants
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check
from dynamics.steps.stacks import Stack


@exclusive
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
    check_step_arguments("patch_gradients", recipe, checkpoint, contrasts, sites, measure)
    check(sites, recipe.model)
    return run_contrasts("patch_gradients", recipe, checkpoint, contrasts, sites, measure, _patched_models)


def _patched_models(runs: Runs, sites: Sequence[Site]) -> Iterator[Stack | Variants]:
    whole = all(site.positions is None for site in sites)
    if whole and runs.steps.separable(runs.base.gradients, runs.source.gradients):
        return mixed_models(runs, sites)
    return chain(reference_models_trimmed(runs), stepped_variants(runs, patched_gradients(runs, sites)))
