"""Datasets as plain JSON: labels of every dim, and each variable as one flat list of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

DIGITS = 7
"""Significant digits that are kept of a number."""


def packed(dataset: xr.Dataset) -> dict[str, Any]:
    """A Dataset as JSON can hold it; `results.tidy` of it is what the page saves as CSV.

    Args:
        dataset: any; a dim without labels is counted from 0, a scalar coordinate is repeated along no dim.

    Returns:
        `dims`, name -> labels; `coords`, name -> {`dim`, `values`}, those along one dim alone; `variables`,
        name -> {`dims`, `values` (row-major, NaN as null, floats to 7 digits), `units`, `words`}.
    """
    return {
        "dims": {
            str(dim): plain(dataset[dim].values if dim in dataset.coords else np.arange(size))
            for dim, size in dataset.sizes.items()
        },
        "coords": {
            str(name): {"dim": str(coord.dims[0]), "values": plain(coord.values)}
            for name, coord in dataset.coords.items()
            if coord.ndim == 1 and name not in dataset.dims
        },
        "variables": {
            str(name): {
                "dims": list(map(str, array.dims)),
                "values": plain(array.values.ravel()),
                "units": str(array.attrs.get("units", "")),
                "words": str(array.attrs.get("long_name", "")),
            }
            for name, array in dataset.data_vars.items()
        },
    }


def plain(values: npt.NDArray[Any]) -> list[Any]:
    """Numbers and texts of a flat array; what is not finite is None."""
    if values.dtype.kind != "f":
        found: list[Any] = values.tolist()
        return found
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]
