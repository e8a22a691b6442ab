"""patch_gradients: take the base step with the source's gradient on one site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics.measures import Measure
from dynamics.patching.experiment import Outcome, Runs, experiment, own, stepped
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site
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
        sites: parameter slices, length n_sites; each is patched alone.
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
    return experiment("patch_gradients", recipe, checkpoint, contrasts, sites, measure, _outcomes)


def _outcomes(recipe: Recipe, runs: Runs, sites: Sequence[Site]) -> Iterator[Outcome]:
    base, source = runs.base, runs.source

    def gradients() -> Iterator[dict[str, Tensor | None]]:
        yield from (base.gradients, source.gradients, runs.coasting())
        for site in sites:
            yield exchanged(base.gradients, source.gradients, site.covers)

    def buffers() -> Iterator[Mapping[str, Tensor | None]]:
        yield from (base.buffers, source.buffers, base.buffers)
        for site in sites:
            yield exchanged(base.buffers, source.buffers, site.covers)

    for parameters, state in zip(stepped(recipe, runs, gradients()), buffers(), strict=True):
        yield {**parameters, **own(state)}  # type: ignore[arg-type]
