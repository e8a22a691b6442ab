"""Sources of a training batch: the part of its gradient that each group of rows contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree

from checkpoints import Checkpoint
from dynamics.engine.batch_rows import split_rows
from dynamics.engine.gradient_prefetch import GradientPrefetch
from dynamics.recipe import Contrast, Recipe
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.gradients import gradient_at
from dynamics.steps.updates_by_source import BEFORE, DECAY
from dynamics.trees import Gradients


def rows_of_sources(batch: Any, labels: Sequence[Any]) -> dict[str, list[int]]:
    """The rows of a batch that come from each source, in the order of their first rows.

    Args:
        batch: as `split_rows`.
        labels: of each row.

    Raises:
        ValueError: not one label for each row, or a label that is kept for momentum and decay.
    """
    n_rows = len(split_rows(batch))
    if len(labels) != n_rows:
        raise ValueError(
            f"sources(batch) gave {len(labels)} labels for {n_rows} rows; expected one for each row."
        )
    rows: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(str(label), []).append(i)
    if taken := sorted({BEFORE, DECAY} & set(rows)):
        raise ValueError(
            f"a source is called {taken[0]!r}, which names what the optimizer adds; call it otherwise."
        )
    return rows


def some_rows(batch: Any, rows: Sequence[int]) -> Any:
    """A batch of some rows of another."""

    def chosen(leaf: Any) -> Any:
        return leaf[list(rows)] if isinstance(leaf, Tensor) and leaf.ndim > 0 else leaf

    return _pytree.tree_map(chosen, batch)


def source_gradients(
    recipe: Recipe,
    state: Checkpoint,
    batch: Any,
    labels: Callable[[Any], Sequence[Any]],
    paths: ComputePaths,
) -> Iterator[tuple[str, Gradients]]:
    """Each source's part of a batch's gradient, one after another: g^(j) = (n_j / n) ∇L(its rows), before clipping.

    Of accumulated micro-batches each has its own parts. They add up to the batch's gradient where the loss is a
    mean over rows.

    Args:
        recipe: as `gradient`.
        state: as `gradient_at`.
        batch: of a step.
        labels: (micro-)batch -> as `rows_of_sources`.
        paths: where it is noted which way gradients were taken.
    """
    alone = replace(recipe, accumulate=1)
    for micro in recipe.micro_batches(batch):
        rows = rows_of_sources(micro, labels(micro))
        n_rows = sum(map(len, rows.values())) * recipe.accumulate
        parts = {label: some_rows(micro, numbers) for label, numbers in rows.items()}
        contrasts = [Contrast(part, part) for part in parts.values()]
        prefetch = GradientPrefetch(alone, state, contrasts, paths, gradient_at)
        for label, part in parts.items():
            found = prefetch.gradient(part, f"source {label!r} of the batch").gradients
            weight = len(rows[label]) / n_rows
            share = {
                n: None if g is None else (g.to_dense() if g.is_sparse else g).mul_(weight)
                for n, g in found.items()
            }
            del found
            yield label, share
            del share
