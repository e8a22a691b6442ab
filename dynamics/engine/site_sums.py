"""Sums over what sites cover: thousands of sites from one pass over each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self._slices: list[tuple[int, _Key, Any]] = []
        elements: dict[_Key, list[tuple[int, ...]]] = {}
        for number, site in enumerate(sites):
            for name, index in site.covers.items():
                if name not in shapes:
                    continue
                whole_axes, left = _left(index, shapes[name])
                if isinstance(left, tuple) and all(isinstance(part, int) for part in left):
                    elements.setdefault((name, whole_axes), []).append((number, *left))
                else:
                    self._slices.append((number, (name, whole_axes), left))
        self._elements = {key: np.array(found).T for key, found in elements.items()}

    def __call__(self, elements: Mapping[str, Tensor]) -> Array:
        """[n_sites], in fp64.

        Args:
            elements: {name: [*shape]}.
        """
        totals: Array = self.of_each({name: tensor[None] for name, tensor in elements.items()})[0]
        return totals

    def of_each(self, elements: Mapping[str, Tensor]) -> Array:
        """[n, n_sites], in fp64.

        Args:
            elements: {name: [n, *shape]}, n numbers for each element; tensors left out count as zero.
        """
        arrays = {name: _array(tensor.detach()) for name, tensor in elements.items()}
        known: dict[_Key, Array] = {}

        def reduced(key: _Key) -> Array:
            """[*axes left, n]: with n last, whatever an index does to the other axes."""
            if key not in known:
                name, whole_axes = key
                found: Array = np.sum(arrays[name], axis=tuple(a + 1 for a in whole_axes), dtype=np.float64)
                known[key] = np.moveaxis(found, 0, -1)
            return known[key]

        n = max((len(array) for array in arrays.values()), default=1)
        totals = np.zeros((n, self._n_sites))
        for key, (numbers, *places) in self._elements.items():
            if key[0] not in arrays:
                continue
            totals[:, numbers] += (
                reduced(key)[tuple(places)].reshape(-1, n).T
            )  # of a tensor each site covers one part
        for number, key, index in self._slices:
            if key[0] not in arrays:
                continue
            totals[:, number] += reduced(key)[index].reshape(-1, n).sum(0)
        return totals


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
