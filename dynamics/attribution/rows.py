"""The rows of a training batch: each one's gradient, and how far it moved the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from checkpoints import Checkpoint
from dynamics.patching.experiment import CHUNK, chunks
from dynamics.recipe import Recipe
from dynamics.steps import gradient, steps_from
from dynamics.trees import Gradients, squared_norm

MOST_DISAGREEMENT = 1e-3
"""‖Σ g_i − g‖ / Σ ‖g_i‖ above which a loss is no mean over rows. Rounding leaves 5e-7 in fp32."""


def rows_of(batch: Any) -> list[Any]:
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


def gradients_of_rows(
    recipe: Recipe, state: Checkpoint, rows: Sequence[Any], whole: Gradients
) -> list[dict[str, Tensor | None]]:
    """Each row's share of the batch's gradient, g_i = ∇L(row i) / n_rows, before clipping.

    Args:
        recipe, state: as for `steps.gradient`.
        rows: of one batch.
        whole: the batch's gradient, to which the shares must add up.

    Raises:
        ValueError: they do not: the loss is no mean over rows.
    """
    shares: list[dict[str, Tensor | None]] = []
    for i, row in enumerate(rows):
        try:
            alone = gradient(recipe, state, row, f"row {i} of the batch").gradients
        except Exception as error:
            error.add_note(f"This was row {i} of the batch by itself. {_NO_MEAN}")
            raise
        shares.append({name: None if g is None else g / len(rows) for name, g in alone.items()})
    gaps = (
        total if (g := whole[name]) is None else total - g
        for name, total in _total(shares, state.parameters).items()
    )
    missed = math.sqrt(sum(map(squared_norm, gaps)))
    lengths = sum(math.sqrt(sum(map(squared_norm, share.values()))) for share in shares)
    if missed > MOST_DISAGREEMENT * lengths:
        raise ValueError(
            f"the gradients of the batch's {len(rows)} rows miss the batch's own gradient by {missed:.2g}, "
            f"with {lengths:.2g} the sum of their lengths. {_NO_MEAN}"
        )
    return shares


_NO_MEAN = (
    "Contributions of rows need a loss that is the mean over the batch's rows of what each row loses by itself: "
    "no sum, no weights between rows, no batch normalisation in training mode, no dropout."
)


def moved_by_each(
    recipe: Recipe,
    state: Checkpoint,
    shares: list[dict[str, Tensor | None]],
    whole: Gradients,
    after: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """How far each row moved every parameter: θ(g) − θ(g − g_i), {name: [n_rows, *shape]}.

    The step with a row left out is the optimizer's own, with its clipping. g − g_i is added up in fp64 from
    the shares of the other rows, so that it is exactly zero where the row was the only one with a gradient: Adam
    would make a step of full size of what rounding leaves.

    Args:
        recipe, state: how a step is taken, and from where.
        shares: g_i, as from `gradients_of_rows`; used up, since they are as large as the result.
        whole: g.
        after: parameters after the step of the whole batch.
    """
    total = _total(shares, state.parameters)
    moved: dict[str, list[Tensor]] = {name: [] for name, g in whole.items() if g is not None}

    def without(share: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {name: None if g is None else _less(total[name], share[name], g) for name, g in whole.items()}

    for chunk in chunks(range(len(shares)), CHUNK):
        left_out = [without(shares[i]) for i in chunk]
        for i in chunk:
            shares[i].clear()
        for parameters in steps_from(recipe, state, left_out):
            for name, distances in moved.items():
                distances.append(after[name] - parameters[name])
    return {name: torch.stack(distances) for name, distances in moved.items()}


def _less(total: Tensor, share: Tensor | None, like: Tensor) -> Tensor:
    return (total if share is None else total - share.double()).to(like.dtype)


def _total(shares: Sequence[Gradients], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Σ g_i in fp64 by parameter; zero where no row has a gradient."""
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
    for share in shares:
        for name, g in share.items():
            if g is not None:
                total[name] += g
    return total
