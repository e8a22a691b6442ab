"""Algebra on dict[str, Tensor]: squared norms, masks, exchanging slices."""

from __future__ import annotations

from collections.abc import Mapping
from types import EllipsisType

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor | None]
Index = tuple[int | slice | Tensor, ...] | Tensor | EllipsisType
"""What of a tensor is meant: a tuple of ints, slices and at most one 1-D integer tensor, a boolean mask of its
shape, or `...` for all."""


def squared_norm(tensor: Tensor | None) -> float:
    """Σ x², accumulated in fp64; 0 for None."""
    return 0.0 if tensor is None else float(tensor.detach().double().square().sum())


def mask(index: Index, shape: torch.Size, device: torch.device) -> Tensor:
    """The boolean tensor of the given shape that is true where the index reaches."""
    if isinstance(index, Tensor):
        return index.to(device)
    covered = torch.zeros(shape, dtype=torch.bool, device=device)
    covered[index] = True
    return covered


def exchanged(
    base: Mapping[str, Tensor | None], source: Mapping[str, Tensor | None], covers: Mapping[str, Index]
) -> dict[str, Tensor | None]:
    """Base with the covered slices taken from source; a selection, so elements keep their bits.

    Tensors that are not covered are the base's own, not copies. A tensor that is None on one side counts
    as zero when only part of it is exchanged.
    """
    result = dict(base)
    for name, index in covers.items():
        if name not in base:
            continue
        ours, theirs = base[name], source[name]
        if isinstance(index, EllipsisType):
            result[name] = theirs
            continue
        if ours is None and theirs is None:
            continue
        ours = torch.zeros_like(theirs) if ours is None else ours.clone()  # type: ignore[arg-type]
        ours[index] = 0 if theirs is None else theirs[index]
        result[name] = ours
    return result
