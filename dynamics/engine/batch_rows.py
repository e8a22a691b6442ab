"""Rows of a training batch: per-sample gradients, and how far each row moved the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from dynamics.engine.gradient_prefetch import GradientPrefetch
from dynamics.engine.runs import Runs, stepped_models
from dynamics.recipe import Contrast
from dynamics.steps import StepGradient
from dynamics.trees import Gradients, squared_norm

MOST_DISAGREEMENT = 1e-3
"""‖Σ g_i − g‖ / Σ ‖g_i‖ above which a loss is no mean over rows. Rounding leaves 5e-7 in fp32."""

NO_MEAN = (
    "Contributions of rows and sources need a loss that is the mean over the batch's rows of what each row loses "
    "by itself: no sum, no weights between rows, no batch normalisation in training mode, no dropout."
)
"""What is said where it is not."""


def split_rows(batch: Any) -> list[Any]:
    """Each row of a batch as a batch of its own.

    Args:
        batch: tensors with one first axis, in a Batch, a tuple, a list, a dict, or any pytree of torch's. Numbers,
            strings and tensors without axes belong to every row.

    Raises:
        ValueError: no tensor has an axis, or they have first axes of different lengths.
    """
    leaves, structure = _pytree.tree_flatten(batch)
    split = [isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves]
    lengths = {len(leaf) for leaf, has_rows in zip(leaves, split, strict=True) if has_rows}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"a {type(batch).__name__} with first axes of lengths {sorted(lengths)} cannot be split into rows; "
            "give a Batch, or a tuple or dict of tensors, whose first axis is the rows in all of them."
        )
    return [
        _pytree.tree_unflatten(
            [leaf[i : i + 1] if has_rows else leaf for leaf, has_rows in zip(leaves, split, strict=True)],
            structure,
        )
        for i in range(lengths.pop())
    ]


def row_gradients(runs: Runs, rows: Sequence[Any]) -> list[dict[str, Tensor | None]]:
    """Per-sample gradients: each row's share of the base batch's, g_i = ∇L(row i) / n_rows, before clipping.

    Args:
        runs: whose base batch it is.
        rows: of that batch.

    Raises:
        ValueError: the shares do not add up to the batch's gradient: the loss is no mean over rows.
    """
    shares: list[dict[str, Tensor | None]] = []
    each_row = [Contrast(row, row) for row in rows]
    prefetch = GradientPrefetch(runs.recipe, runs.checkpoint, each_row, runs.prefetch.paths)
    for i, row in enumerate(rows):
        try:
            alone = prefetch.gradient(row, f"row {i} of the batch").gradients
        except Exception as error:
            error.add_note(f"This was row {i} of the batch by itself. {NO_MEAN}")
            raise
        shares.append({name: None if g is None else g / len(rows) for name, g in alone.items()})
    whole = runs.base.gradients
    gaps = (
        total if (g := whole[name]) is None else total - g for name, total in _total(runs, shares).items()
    )
    missed = math.sqrt(sum(map(squared_norm, gaps)))
    lengths = sum(math.sqrt(sum(map(squared_norm, share.values()))) for share in shares)
    if missed > MOST_DISAGREEMENT * lengths:
        raise ValueError(
            f"the gradients of the batch's {len(rows)} rows miss the batch's own gradient by {missed:.2g}, "
            f"with {lengths:.2g} the sum of their lengths. {NO_MEAN}"
        )
    return shares


def row_updates(
    runs: Runs, shares: Sequence[dict[str, Tensor | None]], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """How far each row moved every parameter: θ(g) − θ(g − g_i), {name: [n_rows, *shape]}.

    The step with a row left out is the optimizer's own, with its clipping. g − g_i is added up in fp64 from
    the shares, so that it is exactly zero where no other row has a gradient: of what rounding would leave there,
    Adam makes a step of full size.

    Args:
        runs: whose base step it is.
        shares: g_i, as from `gradients_of_rows`; emptied, since they are as large as the result.
        after: the model after the whole base step.
    """
    whole = runs.base.gradients
    total = _total(runs, shares)

    def left_out() -> Iterator[StepGradient]:
        for share in shares:
            rest = {n: None if g is None else _less(total[n], share[n], g) for n, g in whole.items()}
            share.clear()
            yield replace(runs.base, gradients=rest)

    moved: dict[str, list[Tensor]] = {name: [] for name, g in whole.items() if g is not None}
    for without in chain.from_iterable(stepped_models(runs, left_out())):
        for name, distances in moved.items():
            distances.append(after[name] - without[name])
    return {name: torch.stack(distances) for name, distances in moved.items()}


def _less(total: Tensor, share: Tensor | None, like: Tensor) -> Tensor:
    """Total − share, of the dtype of `like` and sparse where that is."""
    rest = (total if share is None else total - share).to(like.dtype)
    return rest.to_sparse(like.sparse_dim()) if like.is_sparse else rest


def _total(runs: Runs, shares: Sequence[Gradients]) -> dict[str, Tensor]:
    """Σ g_i in fp64 by parameter; zero where no row has a gradient."""
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in runs.checkpoint.parameters.items()}
    for share in shares:
        for name, g in share.items():
            if g is not None:
                total[name] += g
    return total
