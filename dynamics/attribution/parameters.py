"""attribute_parameters: divide what two checkpoints measure differently among all parts of the model at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import xarray as xr

from checkpoints import CheckpointPair
from dynamics.engine.arguments import check_pair_arguments, named, naming, probe_of
from dynamics.engine.exclusive import exclusive
from dynamics.engine.parameter_attribution import ParameterAttribution
from dynamics.engine.path_integral import Method, Quadrature
from dynamics.engine.progress import progress_bar
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check, check_whole
from dynamics.steps.states import starting_point
from dynamics.steps.worker_threads import worker_threads


@exclusive
def attribute_parameters(
    recipe: Recipe,
    pair: CheckpointPair,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    method: Method = "integrated",
    tolerance: float = 0.01,
    max_nodes: int = 64,
) -> xr.Dataset:
    """Divide M(θ_source) − M(θ_base), what two checkpoints measure differently, among the sites.

        first_order:  A_s = ⟨∇_s M(θ_base), Δ_s⟩                    Δ = θ_source − θ_base
        integrated:   A_s = ∫₀¹ ⟨∇_s M(θ_base + αΔ), Δ_s⟩ dα        Σ_s A_s = M(θ_source) − M(θ_base)

    All sites come from the same gradients, so thousands cost as much as one: where `patch_parameters` takes a
    forward pass for each site, this takes `nodes` backward passes in all. The straight line between far checkpoints
    is not the way that training took: both add up to the same change, and may divide it otherwise.

    Args:
        recipe, pair, contrasts: as `patch_parameters`.
        sites: parts of the parameters, length n_sites, of any size and overlapping as they like, down to
            `sites.neurons` and `sites.rows`. Of a site's buffers nothing is counted.
        measure: as `patch_parameters`, and differentiable.
        method, tolerance, max_nodes: as `attribute_step`. All parameters are moved, also those that do not train.

    Returns:
        `attribution` [example, site], positive where the source's parameters raise the measure; `residual` (ΣA over
        all parameters, whatever the sites, less source − base); `nodes`, the number of gradients averaged; the
        references `base`, `source` [example]. In the measure's units, with a dim `measure` where several were asked
        for. Buffers are the base's all along: what the source's do is left in `residual`, and the tolerance does
        not ask for it.

    Raises:
        As `attribute_step`; a TypeError where no pair is given.

    Source: integrated gradients (Sundararajan et al. 2017) in the space of parameters.
    """
    check_pair_arguments("attribute_parameters", recipe, pair, contrasts, sites, measure)
    quadrature = Quadrature(method, tolerance, max_nodes)
    check(sites, recipe.model)
    check_whole(sites, "attribute_parameters", "leave them out, or use patch_parameters")
    state, other = (starting_point(recipe, checkpoint) for checkpoint in (pair.base, pair.source))
    base, source = ({**c.parameters, **c.buffers} for c in (state, other))
    moved = {n: p.shape for n, p in state.parameters.items() if p.is_floating_point()}
    attribution = ParameterAttribution(
        "attribute_parameters",
        recipe,
        state,
        contrasts,
        sites,
        measure,
        moved,
        ("base", "source"),
        quadrature,
    )
    unmoved = {n: base[n] for n in base.keys() - moved}
    with (
        worker_threads(state.parameters),
        progress_bar("attribute_parameters", len(contrasts), "contrast") as bar,
    ):
        for i, contrast in enumerate(contrasts):
            name, probe = named(contrasts, i), probe_of(contrast)
            with naming(name):
                attribution.evaluate(i, probe, {"base": base, "source": source})
                attribution.divide(i, name, probe, base, source, unmoved)
            bar.update()
    return attribution.labelled(source_step=other.step)
