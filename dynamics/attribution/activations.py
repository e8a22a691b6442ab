"""attribute_activations: read off one gradient of the measure what patching activations finds one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from checkpoints import Checkpoint
from dynamics.engine.activation_exchange import (
    ActivationExchange,
    ActivationTable,
    Values,
    check_activation_arguments,
    check_activation_sites,
    exchange_taps,
)
from dynamics.engine.activation_gradients import (
    Array,
    Elements,
    by_member,
    differences,
    gradients_at,
    hooks_of,
    keys_of,
    sum_of_sizes,
    sums_by_member,
)
from dynamics.engine.arguments import naming
from dynamics.engine.exclusive import exclusive
from dynamics.engine.forward_passes import FrozenModel, MeasurePass, measure_with_taps
from dynamics.engine.path_integral import Method, Quadrature
from dynamics.engine.progress import progress_bar
from dynamics.engine.site_sums import SiteSums
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import site_columns
from dynamics.sites import Site
from dynamics.steps.taps import runs_of


@exclusive
def attribute_activations(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    method: Method = "first_order",
    tolerance: float = 0.01,
    max_nodes: int = 64,
    values: Values = "source",
) -> xr.Dataset:
    """Estimate what `patch_activations` would find at all sites from one gradient of the measure.

        first_order:  A_S = ⟨∇_S M(a_base), Δ_S⟩                    Δ = a_source − a_base
        integrated:   A_S = ∫₀¹ ⟨∇_S M(a_base + αΔ), Δ_S⟩ dα        Σ_S A_S = M(hook exchanged whole) − M(base)

    First order takes two forward passes and one backward pass for each measure, whatever the number of sites:
    down to every element of every attention pattern (`by=("layer", "head", "pos", "src")`). Integrated moves
    one hook's activation at a time along the straight line, with `nodes` gradients for each: its sites divide the
    effect of exchanging that hook's whole activation, exactly up to `residual`.

    Args:
        recipe, checkpoint, contrasts, sites: as `patch_activations`; sites may overlap as they like.
        measure: as there, and differentiable.
        method: "first_order" or "integrated".
        tolerance: nodes are doubled, from 8, until |ΣA − change| / Σ|A| over positions is at most this, at every
            hook.
        max_nodes: at most so many nodes.
        values: as `patch_activations`. With "zero" a pattern's attribution is −∇M ⊙ pattern: attention attribution
            is its negative, how much of the measure each attention weight accounts for.

    Returns:
        `attribution` [example, site], positive where the exchange raises the measure; the references `base`,
        `source` [example]; `nodes`, the gradients averaged at the hook that took most (1 for first order); and for
        the integrated method `residual`, ΣA − change at the hook where it is largest. In the measure's units, with
        a dim `measure` where several were all_passes for.

    Raises:
        As `patch_activations`; a ValueError also for a measure that cannot be differentiated, a NonFiniteGradient
        where a gradient is not finite.

    Source: attribution patching (Nanda 2023; Syed et al. 2023); integrated gradients (Sundararajan et al. 2017)
        in the space of one activation.
    """
    check_activation_arguments("attribute_activations", recipe, checkpoint, contrasts, sites, measure, values)
    quadrature = Quadrature(method, tolerance, max_nodes)
    check_activation_sites("attribute_activations", sites, recipe)
    frozen = FrozenModel.of(recipe, checkpoint)
    table = ActivationTable("attribute_activations", frozen, contrasts, measure)
    attribution, residual = table.empty(len(sites)), table.empty()
    nodes = np.ones_like(residual, dtype=np.int64)
    sums = _Sums(sites)
    with progress_bar("attribute_activations", len(table.passes) * len(contrasts), "contrast") as bar:
        for one_pass, exchange in table.exchanges(sites, values):
            joined = exchange.joined
            cell = np.ix_(one_pass.places, joined.members)
            with naming(joined.name):
                if method == "first_order":
                    gradients = gradients_at(frozen, one_pass, joined, hooks_of(exchange.base), {})
                    delta = differences(exchange, list(exchange.base))
                    products = [{key: g[key].double() * d for key, d in delta.items()} for g in gradients]
                else:
                    products, residual[cell], nodes[cell] = _integrated(
                        frozen, one_pass, exchange, quadrature
                    )
            for place, elements in zip(one_pass.places, products, strict=True):
                for member, rows in zip(joined.members, joined.rows, strict=True):
                    attribution[place, member] = sums({key: e[rows] for key, e in elements.items()})
            bar.update(len(joined.members))
    missed = None if method == "first_order" else residual
    return table.labels(method=method, values=values).attributions(
        attribution, missed, nodes, table.references, "site", site_columns(sites)
    )


def _integrated(
    frozen: FrozenModel, one_pass: MeasurePass, exchange: ActivationExchange, quadrature: Quadrature
) -> tuple[list[Elements], Array, npt.NDArray[np.int64]]:
    """Attributions of every element for each measure; residual and nodes, each [n_measures, n_members]."""
    joined = exchange.joined
    shape = len(one_pass.places), len(joined.members)
    found: list[Elements] = [{} for _ in one_pass.places]
    residual, nodes = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    start = by_member(joined, exchange.base_values)
    for name in hooks_of(exchange.base):
        keys = keys_of(exchange.base, name)
        delta = differences(exchange, keys)
        whole = measure_with_taps(
            frozen, one_pass, joined.base, exchange_taps(Site(name, {name: ...}), exchange.new)
        )
        change = by_member(joined, whole) - start
        for rule in quadrature.rules():
            products = _along(frozen, one_pass, exchange, name, delta, rule)
            missed = sums_by_member(joined, products, torch.sum) - change
            size = sums_by_member(joined, products, sum_of_sizes)
            if bool((np.abs(missed) <= quadrature.tolerance * size).all()):
                break
        for place, elements in enumerate(products):
            found[place] |= elements
        residual = np.where(np.abs(missed) > np.abs(residual), missed, residual)
        nodes = np.maximum(nodes, len(rule))
    return found, residual, nodes


def _along(
    frozen: FrozenModel,
    one_pass: MeasurePass,
    exchange: ActivationExchange,
    name: str,
    delta: Elements,
    rule: Sequence[tuple[float, float]],
) -> list[Elements]:
    """For each measure ∇M ⊙ Δ averaged over the straight path from the base run's activation to the one put in."""
    total = [{key: torch.zeros_like(d) for key, d in delta.items()} for _ in one_pass.places]
    for node, weight in rule:
        at = {key: (exchange.base[key] + node * d).to(exchange.base[key].dtype) for key, d in delta.items()}
        gradients = gradients_at(frozen, one_pass, exchange.joined, [name], at)
        for elements, gradient in zip(total, gradients, strict=True):
            for key, d in delta.items():
                elements[key] += weight * gradient[key] * d
    return total


class _Sums:
    """Sums over what sites cover, over all runs of a submodule."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._known: dict[tuple[Any, ...], SiteSums] = {}

    def __call__(self, elements: Elements) -> Array:
        """[n_sites], in fp64."""
        total = np.zeros(len(self._sites))
        by_name = {name: runs_of(elements, name) for name in hooks_of(elements)}
        for run in range(max(map(len, by_name.values()))):
            present = {name: runs[run] for name, runs in by_name.items() if len(runs) > run}
            shapes = {name: tensor.shape for name, tensor in present.items()}
            key = tuple(shapes.items())
            if key not in self._known:
                self._known[key] = SiteSums(self._sites, shapes)
            total += self._known[key](present)
        return total
