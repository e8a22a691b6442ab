"""Algebra on dict[str, Tensor]: squared norms, masks, exchanging slices; and any tree of tensors in one line."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import fields, is_dataclass
from itertools import islice
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

_BLOCK = 65536
"""Elements whose squares are added up in one go: few enough for the cache."""

_GPU_BLOCK = 2**24
"""The same on a GPU, which is kept busy by fewer and larger kernels."""

_SHOWN = 6
"""Entries of a dict or a list that `described` names."""

_LONGEST = 100
"""Characters of a value that is no tree, in `described`."""

Gradients = Mapping[str, Tensor | None]
Index = tuple[int | slice | Tensor, ...] | Tensor | EllipsisType
"""What of a tensor is meant: a tuple of ints, slices and at most one 1-D integer tensor, a boolean mask of its
shape, or `...` for all."""


def stored(tensor: Tensor) -> Tensor:
    """A tensor's elements; of a sparse one those that it stores, each place once."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def squared_norm(tensor: Tensor | None) -> float:
    """Σ x², accumulated in fp64; 0 for None."""
    return 0.0 if tensor is None else sum(squares(tensor).tolist())


def squares(tensor: Tensor) -> Tensor:
    """Σ x² of a tensor's blocks, in fp64, [n_blocks]: on its device, which is not waited for."""
    size = _BLOCK if tensor.device.type == "cpu" else _GPU_BLOCK
    blocks = torch.split(stored(tensor.detach()).flatten(), size)
    return torch.stack([block.double().square().sum() for block in blocks])


def not_finite(gradients: Gradients) -> str | None:
    """The first name whose gradient has an element that is NaN or infinite; None where all are finite."""
    present = {name: stored(g) for name, g in gradients.items() if g is not None}
    if bool(get_total_norm(list(present.values())).isfinite()):
        return None  # a norm that overflows says nothing about the elements
    return next((name for name, g in present.items() if not bool(torch.isfinite(g).all())), None)


def copied(tensors: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """Tensors by name, those of the given names as copies: what may be written into."""
    return {name: t.clone() if name in names else t for name, t in tensors.items()}


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
    as zero when only part of it is exchanged. Sparse tensors stay sparse; a row is stored where its own side,
    or either of the two where they share it, stores it: some optimizers move stored rows alone.
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
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        if ours.is_sparse or theirs.is_sparse:
            result[name] = _sparse_exchanged(ours, theirs, index)
        else:
            ours[index] = theirs[index]
            result[name] = ours
    return result


def _sparse_exchanged(ours: Tensor, theirs: Tensor, index: Index) -> Tensor:
    """Ours with theirs where the index reaches; dense if one of them is."""
    covered = mask(index, ours.shape, ours.device)
    exchanged = torch.where(covered, theirs.to_dense(), ours.to_dense())
    if not (ours.is_sparse and theirs.is_sparse):
        return exchanged
    shape = ours.shape[: ours.sparse_dim()]
    by_row = covered.reshape(*shape, -1)
    kept = (_rows(ours, shape) & ~by_row.all(-1)) | (_rows(theirs, shape) & by_row.any(-1))
    return torch.sparse_coo_tensor(
        kept.nonzero().T, exchanged[kept], ours.shape, is_coalesced=True, check_invariants=False
    )


def _rows(sparse: Tensor, shape: torch.Size) -> Tensor:
    """The rows that a sparse tensor stores: bool of the shape of its sparse axes."""
    rows = torch.zeros(shape, dtype=torch.bool, device=sparse.device)
    rows[tuple(sparse.coalesce().indices())] = True
    return rows


def described(value: Any) -> str:
    """A batch or another tree in one line, tensors by dtype and shape: `{'x': float32[2, 3], 'y': int64[2]}`.

    Of many entries the first are named and the others counted. A dataclass is described by its fields, without
    those that are None, unless it has a repr of its own.
    """
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.repr:  # type: ignore[attr-defined]
        held = {f.name: getattr(value, f.name) for f in fields(value) if f.repr}
        parts = [f"{name}={described(part)}" for name, part in held.items() if part is not None]
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, Mapping):
        return "{" + _first((f"{key!r}: {described(part)}" for key, part in value.items()), len(value)) + "}"
    if isinstance(value, list | tuple):
        inside = _first(map(described, value), len(value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    text = repr(value)
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}..." if isinstance(value, str) else f"<{type(value).__name__}>"


def _first(parts: Iterable[str], n: int) -> str:
    """The first of n parts, and how many more there are."""
    more = [f"... and {n - _SHOWN} more"] if n > _SHOWN else []
    return ", ".join([*islice(parts, _SHOWN), *more])
