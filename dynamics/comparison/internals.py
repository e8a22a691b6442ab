"""What two checkpoints compute on the way: representations by linear CKA, attention by divergence and by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics import results
from dynamics.batch import Batch
from dynamics.comparison.tables import labelled
from dynamics.models.functional import call_with, eval_mode
from dynamics.recipe import Recipe
from dynamics.results.labels import site_columns
from dynamics.sites import Site, SiteError, check_outputs
from dynamics.sites.outputs import called
from dynamics.steps.states import starting_point
from dynamics.steps.taps import Taps

Role = tuple[Batch, Tensor]
"""Rows, and the position [batch] in each that the scored position may look at."""


def linear_cka(x: Tensor, y: Tensor) -> float:
    """How alike two representations of the same examples are, up to rotation, scale and shift: 0 to 1.

        CKA = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)     columns centred, Frobenius norms

    Args:
        x, y: [n_examples, d_x] and [n_examples, d_y]; computed in fp64.

    Returns:
        NaN where a representation is the same for all examples.

    Source: Kornblith et al. 2019, equation 5.
    """
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    if len(x) < x.shape[1] + y.shape[1]:  # the same three norms from Gram matrices, where those are smaller
        kernels = x @ x.T, y @ y.T
        cross = (kernels[0] * kernels[1]).sum()
        own = [k.norm() for k in kernels]
    else:
        cross = (y.T @ x).square().sum()
        own = [(t.T @ t).norm() for t in (x, y)]
    scale = float(own[0] * own[1])
    return float(cross) / scale if scale > 0 else float("nan")


def compare_activations(
    before: Checkpoint, after: Checkpoint, recipe: Recipe, batch: Any, sites: Sequence[Site]
) -> xr.Dataset:
    """Linear CKA of every site's activations, before against after.

    All axes but the last count as examples: of a residual stream [batch, pos, d_model] every position of every
    row. Positions differ from each other much more than rows do, which brings every CKA close to 1; so sites
    that are cut by position (`by=("layer", "pos")`) say more.

    Args:
        before, after: two checkpoints of the recipe's model.
        recipe: its model runs in eval mode and is not changed.
        batch: what the model is called with: a `Batch`, a tensor, a tuple of arguments or a dict of keyword ones.
        sites: from `sites.activations`, each of one module's output.

    Returns:
        [site]: `cka`, NaN where an activation is the same for all rows.

    Raises:
        SiteError: a site covers no output, or several.
    """
    return compare_internals(before, after, recipe, batch, sites, ())["activations"]


def compare_patterns(
    before: Checkpoint, after: Checkpoint, recipe: Recipe, batch: Any, sites: Sequence[Site]
) -> xr.Dataset:
    """How far each head's attention moved.

    Args:
        before, after, recipe, batch: as `compare_activations`.
        sites: of attention patterns, whose last axis sums to 1, such as
            `sites.activations(model, "*hook_pattern", by=("layer", "head"), like=batch)`.

    Returns:
        [site]: `divergence`, the Jensen–Shannon divergence between the patterns in nats (0 to ln 2), and
        `moved`, their total variation (0 to 1, the share of attention that went elsewhere): means over rows and
        queries. A query that sees itself alone counts as one that did not move.

    Raises:
        SiteError: a site covers no output, or one that is no pattern.

    Source: Lin 1991.
    """
    return compare_internals(before, after, recipe, batch, (), sites)["patterns"]


def compare_internals(
    before: Checkpoint,
    after: Checkpoint,
    recipe: Recipe,
    batch: Any,
    outputs: Sequence[Site],
    patterns: Sequence[Site],
) -> dict[str, xr.Dataset]:
    """`activations` as `compare_activations` and `patterns` as `compare_patterns`, from the same forward passes."""
    chosen = [*outputs, *patterns]
    sides = [_activations(recipe, starting_point(recipe, c), batch, chosen) for c in (before, after)]
    pairs = list(zip(*sides, strict=True))
    steps = {"before": before.step, "after": after.step}
    found = {}
    if outputs:
        values = [linear_cka(*(a.reshape(-1, a.shape[-1]) for a in pair)) for pair in pairs[: len(outputs)]]
        facts = results.provenance(quantity="activations", **steps)
        cka = {"cka": (values, "linear CKA, before and after", "1")}
        found["activations"] = labelled("site", site_columns(outputs), cka, facts)
    if patterns:
        variables = _divergences(patterns, pairs[len(outputs) :])
        facts = results.provenance(quantity="patterns", **steps)
        found["patterns"] = labelled("site", site_columns(patterns), variables, facts)
    return found


def head_roles(
    recipe: Recipe, checkpoint: Checkpoint | None, roles: Mapping[str, Role], sites: Sequence[Site]
) -> xr.Dataset:
    """How much attention each head pays, from the scored position, to a named position.

    Args:
        recipe: its model runs in eval mode and is not changed.
        checkpoint: whose parameters; None takes the model as it stands.
        roles: name -> (rows, position [batch] that is looked at), such as
            {"previous token": (batch, batch.target_pos - 1)}.
        sites: of attention patterns [batch, head, query, key], one head each, as for `compare_patterns`.

    Returns:
        `attention` [measure, site]: the mean over rows of the pattern at (scored position, named position), one
        value of `measure` for each role.

    Raises:
        SiteError: a site covers no output, or no single head's pattern.
        ValueError: there are no roles.
    """
    if not roles:
        raise ValueError("there are no roles; give at least one, as {name: (batch, positions)}.")
    state = starting_point(recipe, checkpoint)
    columns: list[list[float]] = []
    for batch, positions in roles.values():
        rows = torch.arange(len(batch))
        columns.append([])
        for site, pattern in zip(sites, _activations(recipe, state, batch, sites), strict=True):
            if pattern.ndim != 3:
                raise SiteError(
                    f"Site {site.label!r} gives {list(pattern.shape)}; expected one head's [batch, query, key]. "
                    'Cut the pattern with by=("layer", "head").'
                )
            columns[-1].append(float(pattern[rows, batch.target_pos, positions].mean()))
    coords = results.coordinates(site_columns(sites), "site") | results.coordinates(
        {"measure": list(roles)}, "measure"
    )
    words = {"long_name": "attention from the scored position", "units": "share"}
    facts = results.provenance(quantity="roles", step=state.step)
    found = {"attention": (("measure", "site"), np.array(columns), words)}
    return xr.Dataset(found, coords=coords, attrs={"provenance": facts})


def _activations(recipe: Recipe, state: Checkpoint, batch: Any, sites: Sequence[Site]) -> list[Tensor]:
    """What each site covers of one forward pass in eval mode, in fp64."""
    check_outputs(sites, recipe.model)
    if many := [site.label for site in sites if len(site.covers) > 1]:
        raise SiteError(
            f"Site {many[0]!r} covers several outputs; give each a site of its own, with by='layer'."
        )
    kept: dict[str, Tensor] = {}

    def keep(name: str, key: str, activation: Tensor) -> Tensor:
        kept[key] = activation.detach().double()
        return activation

    taps = Taps(sorted({name for site in sites for name in site.covers}), keep)
    tensors = {**state.parameters, **state.buffers}
    with torch.no_grad(), eval_mode(recipe.model), state.random_state(), taps.attached(recipe.model):
        call_with(called, recipe.model, tensors, batch)
    found = []
    for site in sites:
        ((name, index),) = site.covers.items()
        if name not in kept:
            raise SiteError(
                f"Site {site.label!r}: {name!r} gave no floating-point tensor when the model ran."
            )
        found.append(kept[name][index])
    return found


def _divergences(
    sites: Sequence[Site], pairs: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, tuple[list[float], str, str]]:
    for site, pair in zip(sites, pairs, strict=True):
        for pattern in pair:
            if float((pattern.sum(-1) - 1).abs().max()) > 1e-3 or float(pattern.min()) < 0:
                raise SiteError(
                    f"Site {site.label!r} is no attention pattern: its last axis does not sum to 1. Make such "
                    'sites with sites.activations(model, "*hook_pattern", by=("layer", "head"), like=batch).'
                )
    return {
        "divergence": ([_jensen_shannon(*pair) for pair in pairs], "Jensen–Shannon divergence", "nat"),
        "moved": ([float((p - q).abs().sum(-1).mean()) / 2 for p, q in pairs], "total variation", "share"),
    }


def _jensen_shannon(p: Tensor, q: Tensor) -> float:
    """½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2, over the last axis; the mean over all others."""
    m = (p + q) / 2
    terms = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(m, m)
    return float(terms.sum(-1).mean().clamp(min=0)) / 2
