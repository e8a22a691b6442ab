"""attribute_paths: read off a few gradients of the measure what patching paths finds one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics.engine.activation_exchange import (
    ActivationExchange,
    ActivationTable,
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
    sum_of_sizes,
    sums_by_member,
)
from dynamics.engine.arguments import naming
from dynamics.engine.exclusive import exclusive
from dynamics.engine.forward_passes import FrozenModel, MeasurePass, measure_with_taps
from dynamics.engine.path_edges import by_hooks, with_heads, written_at
from dynamics.engine.path_integral import Method, Quadrature
from dynamics.engine.progress import progress_bar
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import site_columns
from dynamics.sites import Site
from dynamics.sites.edges import End, Path, apart, check_paths, receivers_of, senders_of

EMBED = "hook_embed"


@exclusive
def attribute_paths(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    method: Method = "first_order",
    tolerance: float = 0.01,
    max_nodes: int = 64,
) -> xr.Dataset:
    """Estimate what `patch_paths` would find at all edges from one gradient of the measure, or a few.

        first_order:  A_(s to r) = Σ_pos ⟨∂M/∂(input of r), Δs⟩            Δs = s(source batch) − s(base batch)
        integrated:   A_(s to r) = Σ_pos ⟨∫₀¹ ∂M/∂(input of r) dα, Δs⟩     tokens' embedding at e_base + α Δe

    The integrated gradients are taken while the embedding of the tokens goes in a straight line from the base
    batch's to the source batch's. The edges out of the embedding then divide the whole difference of the two runs,
    Σ_r A_(embed to r) = M(source) − M(base), exactly up to `residual`; the edges of other senders have no such sum.

    Args:
        recipe, checkpoint, contrasts, sites: as `patch_paths`; of a site of several edges the sum is given.
        measure: as there, and differentiable.
        method: "first_order" or "integrated".
        tolerance: nodes are doubled, from 8, until |ΣA − change| / Σ|A| over rows and positions of the embedding is
            at most this.
        max_nodes: at most so many nodes.

    Returns:
        As `attribute_activations`: `attribution` [example, site], positive where the exchange raises the measure;
        `base`, `source`, `nodes` [example]; for the integrated method `residual` [example].

    Raises:
        As `patch_paths`; a ValueError also for a measure that cannot be differentiated, a NonFiniteGradient where a
        gradient is not finite.

    Source: edge attribution patching (Syed et al. 2023), with integrated gradients over inputs (Hanna et al. 2024).
    """
    check_activation_arguments("attribute_paths", recipe, checkpoint, contrasts, sites, measure, "source")
    quadrature = Quadrature(method, tolerance, max_nodes)
    chosen = check_paths(sites, recipe.model)
    with apart(recipe.model):
        frozen = FrozenModel.of(recipe, checkpoint)
        table = ActivationTable("attribute_paths", frozen, contrasts, measure)
        attribution, residual = table.empty(len(sites)), table.empty()
        nodes = np.ones_like(residual, dtype=np.int64)
        begins, ends = senders_of(recipe.model), receivers_of(recipe.model)
        written = written_at(chosen, begins)
        check_activation_sites("attribute_paths", written, recipe)
        if EMBED not in [site.label for site in written]:
            written.append(Site(EMBED, {EMBED: ...}))
        read = list(dict.fromkeys(hook for site in chosen for hook in site.covers))
        with progress_bar("attribute_paths", len(table.passes) * len(contrasts), "contrast") as bar:
            for one_pass, exchange in table.exchanges(written, "source"):
                joined = exchange.joined
                cell = np.ix_(one_pass.places, joined.members)
                with naming(joined.name):
                    found, residual[cell], nodes[cell] = _mean_gradients(
                        frozen, one_pass, exchange, read, quadrature
                    )
                delta = differences(exchange, list(exchange.base))
                for place, of_measure in zip(one_pass.places, found, strict=True):
                    by_row = _edges(chosen, begins, ends, of_measure, delta)
                    for member, rows in zip(joined.members, joined.rows, strict=True):
                        attribution[place, member] = by_row[rows].sum(0).numpy()
                bar.update(len(joined.members))
    missed = None if method == "first_order" else residual
    return table.labels(method=method).attributions(
        attribution, missed, nodes, table.references, "site", site_columns(sites)
    )


def _mean_gradients(
    frozen: FrozenModel,
    one_pass: MeasurePass,
    exchange: ActivationExchange,
    read: Sequence[str],
    quadrature: Quadrature,
) -> tuple[list[Elements], Array, npt.NDArray[np.int64]]:
    """Each measure's gradient at what is read, by key in fp64; residual and nodes, each [n_measures, n_members]."""
    joined = exchange.joined
    delta = differences(exchange, [EMBED])[EMBED]
    whole = measure_with_taps(
        frozen, one_pass, joined.base, exchange_taps(Site(EMBED, {EMBED: ...}), exchange.new)
    )
    change = by_member(joined, whole) - by_member(joined, exchange.base_values)
    for rule in quadrature.rules():
        mean: list[Elements] = [{} for _ in one_pass.places]
        for node, weight in rule:
            embedded = (exchange.base[EMBED] + node * delta).to(exchange.base[EMBED].dtype)
            for sums, found in zip(
                mean, gradients_at(frozen, one_pass, joined, [EMBED, *read], {EMBED: embedded}), strict=True
            ):
                for key, gradient in found.items():
                    sums[key] = sums.get(key, 0.0) + weight * gradient.double()
        products = [{EMBED: of_measure[EMBED] * delta} for of_measure in mean]
        missed = sums_by_member(joined, products, torch.sum) - change
        size = sums_by_member(joined, products, sum_of_sizes)
        if bool((np.abs(missed) <= quadrature.tolerance * size).all()):
            break
    return mean, missed, np.full(missed.shape, len(rule), dtype=np.int64)


def _edges(
    chosen: Sequence[Path],
    begins: Mapping[str, End],
    ends: Mapping[str, End],
    of_measure: Elements,
    delta: Elements,
) -> Tensor:
    """⟨gradient at the receiver, difference of the sender⟩ by row: [rows, n_sites]."""
    products: dict[tuple[str, str], Tensor] = {}

    def edges(receiver: str, sender: str) -> Tensor:
        """[rows, receiver's heads, sender's heads]"""
        if (receiver, sender) not in products:
            signal, moved = with_heads(of_measure[receiver]), with_heads(delta[sender])
            products[receiver, sender] = torch.einsum("bprd,bpsd->brs", signal, moved)
        return products[receiver, sender]

    found = []
    for site in chosen:
        parts = [
            edges(receiver, sender)[:, heads[0], heads[1]]
            for receiver, senders in by_hooks(site, begins, ends).items()
            for sender, pairs in senders.items()
            for heads in pairs
        ]
        found.append(torch.stack(parts).sum(0))
    return torch.stack(found, -1)
