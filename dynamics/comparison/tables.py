"""What all quantities share: products over sites, and Datasets of several variables along one dim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from dynamics import results
from dynamics.engine.site_sums import SiteSums
from dynamics.sites import Site

Array = npt.NDArray[np.float64]
Tensors = Mapping[str, Tensor]


class Products:
    """⟨a, b⟩ over what each of several sites covers, in fp64: [n_sites].

    Args:
        sites: checked against the model.
        like: tensors by name, of the shapes that will be multiplied.
    """

    def __init__(self, sites: Sequence[Site], like: Tensors) -> None:
        self._names = {name for site in sites for name in site.covers if name in like}
        self._sums = SiteSums(sites, {name: like[name].shape for name in self._names})

    def __call__(self, a: Tensors, b: Tensors) -> Array:
        """Tensors of the given names on both sides; a dense or sparse gradient, of any floating dtype."""
        return self._sums({name: dense(a[name]) * dense(b[name]) for name in self._names})


def dense(tensor: Tensor) -> Tensor:
    """The tensor in fp64, without sparsity."""
    return (tensor.to_dense() if tensor.is_sparse else tensor).detach().double()


def differences(later: Tensors, earlier: Tensors) -> dict[str, Tensor]:
    """later − earlier in fp64, of the floating tensors."""
    return {n: dense(t) - dense(earlier[n]) for n, t in later.items() if t.is_floating_point()}


def cosine(product: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike) -> Array:
    """⟨a, b⟩ / (‖a‖ ‖b‖) from the product and the squared norms; NaN where a side is zero."""
    scale = np.sqrt(np.asarray(first, float) * np.asarray(second, float))
    found: Array = np.divide(product, scale, out=np.full(scale.shape, np.nan), where=scale > 0)
    return found


def presented(gradients: Mapping[str, Tensor | None], like: Tensors) -> dict[str, Tensor]:
    """Gradients by name, zero where there is none."""
    return {
        name: torch.zeros_like(t) if (g := gradients.get(name)) is None else g for name, t in like.items()
    }


def labelled(
    dim: str,
    coords: Mapping[str, Sequence[Any]],
    variables: Mapping[str, tuple[npt.ArrayLike, str, str]],
    provenance: str,
) -> xr.Dataset:
    """Several variables along one dim.

    Args:
        dim: of `results.DIMS`.
        coords: columns along it; `dim` holds the labels.
        variables: name -> (values, long name, units); values of one number have no dim.
        provenance: from `results.provenance`.
    """
    known = results.coordinates(coords, dim)
    data = {
        name: ((dim,) if np.ndim(values) else (), np.asarray(values), {"long_name": words, "units": units})
        for name, (values, words, units) in variables.items()
    }
    return xr.Dataset(data, coords=known, attrs={"provenance": provenance})
