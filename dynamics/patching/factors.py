"""patch_factors: exchange one factor of a gradient, the inputs x or the backward signals δ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import xarray as xr

from checkpoints import Checkpoint
from dynamics import results
from dynamics.engine.arguments import check_step_arguments
from dynamics.engine.exclusive import exclusive
from dynamics.engine.factor_crossing import CrossedFactors, Run
from dynamics.engine.runs import Runs, Variants, reference_models_trimmed, run_contrasts, stepped_variants
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check
from dynamics.steps import StepGradient
from dynamics.steps.stacks import Stack
from dynamics.trees import exchanged

CROSSINGS: dict[str, tuple[Run, Run]] = {
    "x": ("source", "base"),
    "delta": ("base", "source"),
    "both": ("source", "source"),
}
"""Which run x and δ come from; the fourth crossing is the base run itself."""


@exclusive
def patch_factors(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
) -> xr.Dataset:
    """Take each contrast's base step with one factor of one site's gradient from the source run.

    The gradient of a linear layer is Σ δ xᵀ over positions. With x and δ each from the base (U) or the source (R):

        δ_R x_R − δ_U x_U = (δ_R − δ_U) x_U + δ_U (x_R − x_U) + (δ_R − δ_U)(x_R − x_U)

    The first term ("delta") is another error signal that reached the same content, the second ("x") the same
    signal that met other content, the third their interaction: "both" less "x" less "delta".

    Args:
        recipe, checkpoint, contrasts, measure: as `patch_gradients`; base and source batches of one shape.
        sites: parameter slices of linear layers, norms and embeddings: of any module that holds parameters
            and no other such modules, or that declares `projections()`. A site with positions
            (`sites.at_positions`) exchanges the factor there alone.

    Returns:
        As `patch_gradients`, with a dim `factor` ("x", "delta", "both") on `patched` and `effect`.

    Raises:
        SiteError: also where a parameter's gradient has no such factors, or the two runs differ in shape.
    """
    check_step_arguments("patch_factors", recipe, checkpoint, contrasts, sites, measure)
    check(sites, recipe.model)
    cells = [replace(s, label=f"{s.label} | {factor}") for s in sites for factor in CROSSINGS]
    found = run_contrasts("patch_factors", recipe, checkpoint, contrasts, cells, measure, _patched_models)
    return results.folded(found, "factor", list(CROSSINGS), [s.label for s in sites])


def _patched_models(runs: Runs, sites: Sequence[Site]) -> Iterator[Stack | Variants]:
    return chain(reference_models_trimmed(runs), stepped_variants(runs, _patched(runs, sites)))


def _patched(runs: Runs, sites: Sequence[Site]) -> Iterator[StepGradient]:
    factors = CrossedFactors(runs, sites)
    for i, site in enumerate(sites):
        x, delta = list(CROSSINGS.values())[i % len(CROSSINGS)]
        crossed = factors.gradient(x, delta, site.positions)
        yield replace(runs.base, gradients=exchanged(runs.base.gradients, crossed, site.covers))
