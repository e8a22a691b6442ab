"""Gradient alignment: does learning a definition by itself help to answer questions?

The quantity of implicit meta-learning: where reliable definitions' gradients point towards the questions' more than
unreliable ones' do, an optimizer that only ever sees definitions internalises the reliable ones better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from checkpoints import Checkpoint
from dynamics import measures, results
from dynamics.comparison.tables import Array, Products, cosine, presented
from dynamics.engine.progress import SECONDS_BEFORE_PROGRESS
from dynamics.measures import Measure
from dynamics.models.functional import eval_mode
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import check_coordinates, columns, site_columns
from dynamics.sites import Site, check, check_whole
from dynamics.steps import gradient
from dynamics.steps.states import starting_point
from dynamics.trees import Index

GRAM_ELEMENTS = 2**24
"""Elements of a parameter multiplied at once for all examples, in fp64: 128 MB a side."""


def align_gradients(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure] = measures.correct_log_prob,
) -> xr.Dataset:
    """Cosine between the way down a training batch's loss and the way up the measure of its probe.

        alignment_s = cos(−∇_s L(batch), ∇_s M(probe))

    With the measure `correct_log_prob` it is the cosine between the gradients of the loss on a definition and on
    that alias's questions. It has a verb's signature, so `sweep` calls it too.

    Args:
        recipe: model and loss; nothing of it is changed. The loss runs in the model's mode, measures in eval mode.
        checkpoint: whose parameters; None takes the model as it stands. Its optimizer does not matter.
        contrasts: `base` and `source` (definitions under two tags), `probe` (questions), length n_examples.
        sites: parts of the parameters, length n_sites.
        measure: of the probe, differentiable; rows are averaged.

    Returns:
        [(measure,) example, site]: `base` and `source`, the alignment of each batch, and `effect`, source − base.
        NaN where a gradient is zero on a site.

    Raises:
        SiteError: a site covers what the model does not have, or positions.
        NonFiniteGradient: names the contrast. ValueError: nothing to align.

    Source: Krasheninnikov et al. 2023 (arXiv 2310.15047), gradient alignment.
    """
    state, by_name = _begun(recipe, checkpoint, contrasts, sites, measure, "align_gradients")
    products = Products(sites, state.parameters)
    values = np.full((2, len(by_name), len(contrasts), len(sites)), np.nan)
    bar = tqdm(contrasts, desc="align_gradients", unit="contrast", delay=SECONDS_BEFORE_PROGRESS)
    for i, contrast in enumerate(bar):
        name = _name(contrast, i)
        downs = [
            _down(recipe, state, batch, f"the {side} batch of {name}")
            for side, batch in (("base", contrast.base), ("source", contrast.source))
        ]
        for m, function in enumerate(by_name.values()):
            up = _up(recipe, state, function, contrast.probe, f"the probe of {name}")
            square = products(up, up)
            for side, down in enumerate(downs):
                values[side, m, i] = cosine(products(down, up), products(down, down), square)
    several = isinstance(measure, Mapping)
    base, source = values if several else values[:, 0]
    dims = ("measure", "example", "site") if several else ("example", "site")
    coords = _coords(contrasts, "example") | results.coordinates(site_columns(sites), "site")
    if several:
        coords |= results.coordinates({"measure": list(by_name)}, "measure")
    variables = {
        "effect": (dims, source - base, {"long_name": "alignment, source − base", "units": "1"}),
        "base": (dims, base, {"long_name": "alignment of the base batch", "units": "1"}),
        "source": (dims, source, {"long_name": "alignment of the source batch", "units": "1"}),
    }
    facts = results.provenance(verb="align_gradients", step=state.step, measure=list(by_name))
    return xr.Dataset(variables, coords=coords, attrs={"provenance": facts})


def align_groups(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure = measures.correct_log_prob,
) -> xr.Dataset:
    """The same cosine between every contrast's batches and every contrast's probe.

    Args:
        recipe, checkpoint, sites: as `align_gradients`.
        contrasts: as `align_gradients`. All gradients are held at once: three models for each contrast.
        measure: one.

    Returns:
        `base` and `source` [example, other, site]: of that batch of `example` with the probe of `other`, whose
        coordinates have `other_` before their names. `relations` averages one of them within and across groups.

    Raises:
        As `align_gradients`.
    """
    state, by_name = _begun(recipe, checkpoint, contrasts, sites, measure, "align_groups")
    (function,) = by_name.values()
    bases, sources, ups = [], [], []
    bar = tqdm(contrasts, desc="align_groups", unit="contrast", delay=SECONDS_BEFORE_PROGRESS)
    for i, contrast in enumerate(bar):
        name = _name(contrast, i)
        bases.append(_down(recipe, state, contrast.base, f"the base batch of {name}"))
        sources.append(_down(recipe, state, contrast.source, f"the source batch of {name}"))
        ups.append(_up(recipe, state, function, contrast.probe, f"the probe of {name}"))
    base, source = np.split(_cosines([*bases, *sources], ups, sites), 2)
    coords = _coords(contrasts, "example") | results.coordinates(site_columns(sites), "site")
    for name, (_, column) in _coords(contrasts, "example").items():
        coords["other" if name == "example" else f"other_{name}"] = ("other", column)
    dims, units = ("example", "other", "site"), {"units": "1"}
    found = {
        "base": (dims, base, {"long_name": "alignment of the base batch", **units}),
        "source": (dims, source, {"long_name": "alignment of the source batch", **units}),
    }
    facts = results.provenance(quantity="align_groups", step=state.step, measure=list(by_name))
    return xr.Dataset(found, coords=coords, attrs={"provenance": facts})


def relations(aligned: xr.Dataset, side: str = "base", group: str = "set") -> xr.Dataset:
    """Each example's alignment with its own probe, with others of its group, and with those of other groups.

    Args:
        aligned: from `align_groups`.
        side: which batch of each example, "base" or "source".
        group: the coordinate that says which group an example is of.

    Returns:
        [example, site] and any further dims: `own`, `within` (mean over the others of its group; NaN where it is
        alone in it), `across` (mean over all of other groups; NaN where there is none).

    Raises:
        ValueError: there is no such coordinate. KeyError: there is no such side.
    """
    if group not in aligned.coords:
        raise ValueError(f"no coordinate {group!r}; expected one of {sorted(map(str, aligned.coords))}")
    values = aligned[side]
    same = aligned["example"].values[:, None] == aligned["other"].values
    alike = aligned[group].values[:, None] == aligned[f"other_{group}"].values
    masks = {
        "own": (same, "its own probe"),
        "within": (alike & ~same, f"others of its {group}"),
        "across": (~alike, f"those of another {group}"),
    }
    found = {}
    for name, (mask, words) in masks.items():
        mean = values.where(xr.DataArray(mask, dims=("example", "other"))).mean("other")
        found[name] = mean.assign_attrs(long_name=f"alignment with {words}", units="1")
    return xr.Dataset(found, attrs=aligned.attrs)


def _begun(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    what: str,
) -> tuple[Checkpoint, dict[str, Measure]]:
    """The state and the measures by name, once all is checked."""
    by_name = measures.named(measure)
    if not contrasts or not sites or not by_name:
        missing = "contrasts" if not contrasts else "measures" if sites else "sites"
        raise ValueError(f"{what} was given no {missing}; it needs at least one.")
    check(sites, recipe.model)
    check_whole(sites, what, "leave them out, as sites.heads(model) does")
    check_coordinates(contrasts, sites)
    return starting_point(recipe, checkpoint), by_name


def _down(recipe: Recipe, state: Checkpoint, batch: Any, where: str) -> dict[str, Tensor]:
    """−∇L of a batch."""
    found = presented(gradient(recipe, state, batch, where).gradients, state.parameters)
    return {name: -g for name, g in found.items()}


def _up(recipe: Recipe, state: Checkpoint, measure: Measure, probe: Any, where: str) -> dict[str, Tensor]:
    """∇M of a probe, rows averaged."""

    def mean(model: nn.Module, batch: Any) -> Tensor:
        return measure(model, batch).mean()

    with eval_mode(recipe.model):
        found = gradient(replace(recipe, loss=mean), state, probe, where)
    return presented(found.gradients, state.parameters)


def _cosines(
    downs: Sequence[Mapping[str, Tensor]], ups: Sequence[Mapping[str, Tensor]], sites: Sequence[Site]
) -> Array:
    """Cosines of all pairs on every site: [n_downs, n_ups, n_sites]. A whole tensor is multiplied once for all."""
    whole: dict[str, _Gram] = {}

    def gram(name: str, index: Index) -> _Gram:
        if index is not ...:
            return _gram(downs, ups, name, index)
        if name not in whole:
            whole[name] = _gram(downs, ups, name, index)
        return whole[name]

    found = []
    for site in sites:
        products, first, second = np.zeros((len(downs), len(ups))), np.zeros(len(downs)), np.zeros(len(ups))
        for name in site.covers.keys() & downs[0].keys():
            for total, part in zip((products, first, second), gram(name, site.covers[name]), strict=True):
                total += part
        found.append(cosine(products, first[:, None], second[None, :]))
    return np.stack(found, -1)


_Gram = tuple[Array, Array, Array]
"""Products [n_downs, n_ups] and squared norms [n_downs], [n_ups] over a part of one tensor."""


def _gram(
    downs: Sequence[Mapping[str, Tensor]], ups: Sequence[Mapping[str, Tensor]], name: str, index: Index
) -> _Gram:
    """In fp64, so many elements at a time that they fit."""
    sides = [[g[name].to_dense()[index].reshape(-1) for g in gs] for gs in (downs, ups)]
    size = max(1, GRAM_ELEMENTS // len(downs))
    products, squares = np.zeros((len(downs), len(ups))), (np.zeros(len(downs)), np.zeros(len(ups)))
    for start in range(0, sides[0][0].numel(), size):
        a, b = (torch.stack([g[start : start + size] for g in side]).double() for side in sides)
        products += (a @ b.T).numpy(force=True)
        for square, part in zip(squares, (a, b), strict=True):
            square += torch.linalg.vector_norm(part, dim=-1).square().numpy(force=True)
    return products, *squares


def _coords(contrasts: Sequence[Contrast], dim: str) -> dict[str, Any]:
    rows = [{"example": _name(contrast, i), **contrast.coords} for i, contrast in enumerate(contrasts)]
    return dict(results.coordinates(columns(rows), dim))


def _name(contrast: Contrast, i: int) -> str:
    return str(contrast.coords.get("example", f"contrast {i}"))
