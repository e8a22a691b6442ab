"""Sums over what sites cover: thousands of sites from one pass over each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamics.sites import Site
from dynamics.trees import Index

Array = npt.NDArray[np.float64]


_Key = tuple[str, tuple[int, ...]]
"""A tensor's name, and the axes that are added up whole."""


class SiteSums:
    """Σ over what each of several sites covers.

    A site takes most axes of a tensor whole (a head all but the first, a neuron all but one), so each tensor
    is summed over those axes once for all sites that do, and a site reads its few numbers from what is left.

    Args:
        sites: checked against the model.
        shapes: of the tensors to be summed; what a site covers beyond them counts as zero.
    """

    def __init__(self, sites: Sequence[Site], shapes: Mapping[str, torch.Size]) -> None:
        self._n_sites = len(sites)
        self._slices: dict[str, list[tuple[int, tuple[int, ...], Any]]] = {}
        elements: dict[_Key, list[tuple[int, ...]]] = {}
        for number, site in enumerate(sites):
            for name, index in site.covers.items():
                if name not in shapes:
                    continue
                whole_axes, left = _left(index, shapes[name])
                if isinstance(left, tuple) and all(isinstance(part, int) for part in left):
                    elements.setdefault((name, whole_axes), []).append((number, *left))
                else:
                    self._slices.setdefault(name, []).append((number, whole_axes, left))
        self._elements: dict[str, list[tuple[tuple[int, ...], npt.NDArray[np.int64]]]] = {}
        for (name, whole_axes), found in elements.items():
            self._elements.setdefault(name, []).append((whole_axes, np.array(found).T))

    def __call__(self, elements: Mapping[str, Tensor]) -> Array:
        """[n_sites], in fp64.

        Args:
            elements: {name: [*shape]}; tensors left out count as zero.
        """
        totals = np.zeros((1, self._n_sites))
        for name, tensor in elements.items():
            self.add(totals, name, tensor[None])
        found: Array = totals[0]
        return found

    def add(self, totals: Array, name: str, elements: Tensor) -> None:
        """Add one tensor's elements to sums over sites.

        Args:
            totals: [n, n_sites], in fp64; written.
            name: of the tensor.
            elements: [n, *shape], n numbers for each of its elements.
        """
        array, n = _array(elements.detach()), len(totals)
        known: dict[tuple[int, ...], Array] = {}

        def reduced(whole_axes: tuple[int, ...]) -> Array:
            """[*axes left, n]: with n last, whatever an index does to the other axes."""
            if whole_axes not in known:
                found: Array = np.sum(array, axis=tuple(a + 1 for a in whole_axes), dtype=np.float64)
                known[whole_axes] = np.moveaxis(found, 0, -1)
            return known[whole_axes]

        for whole_axes, (numbers, *places) in self._elements.get(name, ()):
            # of a tensor each site covers one part
            totals[:, numbers] += reduced(whole_axes)[tuple(places)].reshape(-1, n).T
        for number, whole_axes, index in self._slices.get(name, ()):
            totals[:, number] += reduced(whole_axes)[index].reshape(-1, n).sum(0)


def site_sums(sites: Sequence[Site], shapes: Mapping[str, torch.Size]) -> SiteSums:
    """`SiteSums`, prepared once for calls on end with the same sites and shapes."""
    return _prepared(tuple(sites), tuple(shapes.items()))


@lru_cache(maxsize=1)
def _prepared(sites: tuple[Site, ...], shapes: tuple[tuple[str, torch.Size], ...]) -> SiteSums:
    return SiteSums(sites, dict(shapes))


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """As NumPy has it: in fp64 where NumPy lacks the dtype."""
    return (tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.double()).cpu().numpy()


def _left(index: Index, shape: torch.Size) -> tuple[tuple[int, ...], Any]:
    """The axes that an index takes whole, and the index on those that are left."""
    if isinstance(index, Tensor):
        return (), index.cpu().numpy()
    whole, left = [], []
    parts = () if isinstance(index, EllipsisType) else index
    for axis, part in enumerate(parts):
        if isinstance(part, slice) and len(range(shape[axis])[part]) == shape[axis]:
            whole.append(axis)
        else:
            left.append(_part(part, shape[axis]))
    return (*whole, *range(len(parts), len(shape))), tuple(left)


def _part(part: int | slice | Tensor, size: int) -> int | slice | npt.NDArray[np.int64]:
    """An index along one axis; of places named twice, or from either end, each counts once."""
    return np.unique(part.cpu().numpy() % size) if isinstance(part, Tensor) else part
