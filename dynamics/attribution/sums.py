"""Sums over what sites cover: thousands of sites from one pass over each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamics.sites import Site
from dynamics.trees import Index

Array = npt.NDArray[np.float64]

_ALL = slice(None)


@dataclass(frozen=True)
class _Term:
    """One tensor's share of a site: the axes it takes whole, and the index on those that are left."""

    name: str
    whole_axes: tuple[int, ...]
    index: Any


class SiteSums:
    """Σ over what each of several sites covers.

    A site takes most axes of a tensor whole (a head all but the first, a neuron all but one), so each tensor
    is summed over those axes once for all sites that do, and a site reads its few numbers from what is left.

    Args:
        sites: checked against the model.
        shapes: of the tensors to be summed; what a site covers beyond them counts as zero.
    """

    def __init__(self, sites: Sequence[Site], shapes: Mapping[str, torch.Size]) -> None:
        self._terms = [
            [_term(name, index, shapes[name]) for name, index in site.covers.items() if name in shapes]
            for site in sites
        ]

    def __call__(self, elements: Mapping[str, Tensor]) -> Array:
        """[n_sites], in fp64.

        Args:
            elements: {name: [*shape]}.
        """
        arrays = {name: tensor.detach().double().cpu().numpy() for name, tensor in elements.items()}
        reduced: dict[tuple[str, tuple[int, ...]], Array] = {}

        def value(term: _Term) -> float:
            key = (term.name, term.whole_axes)
            if key not in reduced:
                reduced[key] = np.sum(arrays[term.name], axis=term.whole_axes)
            return float(reduced[key][term.index].sum())

        return np.array([sum(map(value, terms)) for terms in self._terms], dtype=np.float64)


def _term(name: str, index: Index, shape: torch.Size) -> _Term:
    if isinstance(index, Tensor):
        return _Term(name, (), index.cpu().numpy())
    parts = () if isinstance(index, EllipsisType) else index
    padded = [*parts, *[slice(None)] * (len(shape) - len(parts))]
    whole, left = [], []
    for axis, (part, n) in enumerate(zip(padded, shape, strict=True)):
        if isinstance(part, slice) and (part == _ALL or len(range(n)[part]) == n):
            whole.append(axis)
        else:
            left.append(_part(part, n))
    return _Term(name, tuple(whole), tuple(left))


def _part(part: int | slice | Tensor, size: int) -> int | slice | npt.NDArray[np.int64]:
    """An index along one axis; of places named twice, or from either end, each counts once."""
    return np.unique(part.cpu().numpy() % size) if isinstance(part, Tensor) else part
