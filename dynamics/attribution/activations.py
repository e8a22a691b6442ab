"""attribute_activations: read off one gradient of the measure what patching activations finds one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.engine.forward_passes import (
    Activations,
    Exchange,
    Pack,
    Pass,
    Standing,
    Values,
    exchanges,
    exchanging,
    measured,
    passes,
)
from dynamics.engine.path_integral import Method, Quadrature
from dynamics.engine.runs import SECONDS_BEFORE_PROGRESS
from dynamics.engine.site_sums import SiteSums
from dynamics.measures import Measure
from dynamics.patching.activations import check_activation_sites, fill
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import Labels, site_columns
from dynamics.sites import Site
from dynamics.steps import NonFiniteGradient
from dynamics.steps.taps import Taps, runs_of

Array = npt.NDArray[np.float64]


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
        a dim `measure` where several were asked for.

    Raises:
        As `patch_activations`; a ValueError also for a measure that cannot be differentiated, a NonFiniteGradient
        where a gradient is not finite.

    Source: attribution patching (Nanda 2023; Syed et al. 2023); integrated gradients (Sundararajan et al. 2017)
        in the space of one activation.
    """
    quadrature = Quadrature(method, tolerance, max_nodes)
    check_activation_sites("attribute_activations", recipe, contrasts, sites, values)
    by_name = measures.named(measure)
    standing = Standing.of(recipe, checkpoint)
    shape = len(by_name), len(contrasts)
    attribution = np.full((*shape, len(sites)), np.nan)
    residual, nodes = np.full(shape, np.nan), np.ones(shape, dtype=np.int64)
    references = {name: np.full(shape, np.nan) for name in ("base", "source")}
    asked, sums = passes(by_name), _Sums(sites)
    total = len(asked) * len(contrasts)
    delay = SECONDS_BEFORE_PROGRESS
    with tqdm(total=total, desc="attribute_activations", unit="contrast", delay=delay) as bar:
        for one_pass in asked:
            for exchange in exchanges(standing, one_pass, contrasts, sites, values):
                pack = exchange.pack
                fill(references["base"], one_pass, pack, exchange.base_values)
                fill(references["source"], one_pass, pack, exchange.source_values)
                cell = np.ix_(one_pass.places, pack.members)
                if method == "first_order":
                    gradients = gradients_at(standing, one_pass, pack, _hooks(exchange.base), {})
                    delta = differences(exchange, list(exchange.base))
                    products = [{key: g[key].double() * d for key, d in delta.items()} for g in gradients]
                else:
                    products, residual[cell], nodes[cell] = _integrated(
                        standing, one_pass, exchange, quadrature
                    )
                for place, elements in zip(one_pass.places, products, strict=True):
                    for member, rows in zip(pack.members, pack.rows, strict=True):
                        attribution[place, member] = sums({key: e[rows] for key, e in elements.items()})
                bar.update(len(pack.members))
    return Labels(
        measure,
        contrasts,
        "attribute_activations",
        standing.step,
        {"method": method, "values": values},
    ).attributions(
        attribution,
        None if method == "first_order" else residual,
        nodes,
        references,
        "site",
        site_columns(sites),
    )


Elements = dict[str, Tensor]
"""Something for every element of the activations, by key: [rows, ...]."""


def gradients_at(
    standing: Standing, one_pass: Pass, pack: Pack, names: Sequence[str], at: Activations
) -> list[Elements]:
    """For each measure of a pass its gradient with respect to activations; a row's mean is its contrast's.

    Args:
        names: submodules whose activations are meant.
        at: values that some of these take instead of their own, by key.
    """
    watched: dict[str, Tensor] = {}

    def change(name: str, key: str, activation: Tensor) -> Tensor:
        given = at.get(key, activation)
        watched[key] = given.clone() if given.requires_grad else given.detach().clone().requires_grad_()
        return watched[key].clone()  # what comes after may write into it

    taps = Taps(names, change)

    def run(model: nn.Module, batch: Any) -> list[Elements]:
        found = one_pass(model, batch)
        taps.forward_is_over()
        gradients = []
        for value in found:
            total = torch.stack(pack.means(value)).sum()
            if not total.requires_grad:
                raise ValueError(
                    "a measure has no gradient with respect to any of the activations, so nothing can be "
                    "attributed. Give one that can be differentiated, such as a logit; patch_activations takes any."
                )
            parts = torch.autograd.grad(total, list(watched.values()), allow_unused=True, retain_graph=True)
            gradients.append(
                {
                    key: torch.zeros_like(a) if g is None else g
                    for (key, a), g in zip(watched.items(), parts, strict=True)
                }
            )
        return gradients

    with torch.enable_grad(), taps.attached(standing.model):
        gradients = standing.run(run, pack.base)
    for key in watched:
        if not all(bool(torch.isfinite(of_measure[key]).all()) for of_measure in gradients):
            raise NonFiniteGradient(f"The gradient of a measure of {pack.name} at {key} is not finite.")
    return gradients


def differences(exchange: Exchange, keys: Sequence[str]) -> Elements:
    """What is put in less what was there, in fp64; zero where they are equal, as at masked scores of −inf."""
    pairs = {key: (exchange.new[key].double(), exchange.base[key].double()) for key in keys}
    return {key: torch.where(new == old, 0.0, new - old) for key, (new, old) in pairs.items()}


def _integrated(
    standing: Standing, one_pass: Pass, exchange: Exchange, quadrature: Quadrature
) -> tuple[list[Elements], Array, npt.NDArray[np.int64]]:
    """Attributions of every element for each measure; residual and nodes, each [n_measures, n_members]."""
    pack = exchange.pack
    shape = len(one_pass.places), len(pack.members)
    found: list[Elements] = [{} for _ in one_pass.places]
    residual, nodes = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    start = by_member(pack, exchange.base_values)
    for name in _hooks(exchange.base):
        keys = _keys(exchange.base, name)
        delta = differences(exchange, keys)
        whole = measured(standing, one_pass, pack.base, exchanging(Site(name, {name: ...}), exchange.new))
        change = by_member(pack, whole) - start
        for rule in quadrature.rules():
            products = _along(standing, one_pass, exchange, name, delta, rule)
            missed = sums_by_member(pack, products, torch.sum) - change
            size = sums_by_member(pack, products, sum_of_sizes)
            if bool((np.abs(missed) <= quadrature.tolerance * size).all()):
                break
        for place, elements in enumerate(products):
            found[place] |= elements
        residual = np.where(np.abs(missed) > np.abs(residual), missed, residual)
        nodes = np.maximum(nodes, len(rule))
    return found, residual, nodes


def _along(
    standing: Standing,
    one_pass: Pass,
    exchange: Exchange,
    name: str,
    delta: Elements,
    rule: Sequence[tuple[float, float]],
) -> list[Elements]:
    """For each measure ∇M ⊙ Δ averaged over the line from the base run's activation to the one put in."""
    total = [{key: torch.zeros_like(d) for key, d in delta.items()} for _ in one_pass.places]
    for place, weight in rule:
        at = {key: (exchange.base[key] + place * d).to(exchange.base[key].dtype) for key, d in delta.items()}
        gradients = gradients_at(standing, one_pass, exchange.pack, [name], at)
        for elements, gradient in zip(total, gradients, strict=True):
            for key, d in delta.items():
                elements[key] += weight * gradient[key] * d
    return total


def _hooks(activations: Activations) -> list[str]:
    """Names of the submodules whose activations these are."""
    return [key for key in activations if not key.endswith("]")]


def _keys(activations: Activations, name: str) -> list[str]:
    """Keys of all runs of a submodule."""
    return [f"{name}[{n}]" if n else name for n in range(len(runs_of(activations, name)))]


def by_member(pack: Pack, values: Sequence[Tensor]) -> Array:
    """Means of what measures gave: [n_measures, n_members]."""
    return np.array([[float(mean) for mean in pack.means(value)] for value in values])


def sums_by_member(pack: Pack, products: Sequence[Elements], summed: Callable[[Tensor], Tensor]) -> Array:
    """Sums over all elements of each member's rows: [n_measures, n_members]."""
    return np.array(
        [
            [sum(float(summed(e[rows])) for e in elements.values()) for rows in pack.rows]
            for elements in products
        ]
    )


def sum_of_sizes(elements: Tensor) -> Tensor:
    """Σ |ΣA| over the first two axes, rows and positions."""
    return elements.reshape(*elements.shape[:2], -1).sum(-1).abs().sum()


class _Sums:
    """Sums over what sites cover, over all runs of a submodule."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._known: dict[tuple[Any, ...], SiteSums] = {}

    def __call__(self, elements: Elements) -> Array:
        """[n_sites], in fp64."""
        total = np.zeros(len(self._sites))
        by_name = {name: runs_of(elements, name) for name in _hooks(elements)}
        for run in range(max(map(len, by_name.values()))):
            present = {name: runs[run] for name, runs in by_name.items() if len(runs) > run}
            shapes = {name: tensor.shape for name, tensor in present.items()}
            key = tuple(shapes.items())
            if key not in self._known:
                self._known[key] = SiteSums(self._sites, shapes)
            total += self._known[key](present)
        return total
