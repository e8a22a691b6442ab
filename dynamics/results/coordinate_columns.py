"""Dims and coordinates of results: their names, their dtypes, what stands for what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamics.site_coordinates import MEANINGS, SITE_COORDS

Coordinate = tuple[str, npt.NDArray[Any]] | tuple[str, npt.NDArray[Any], dict[str, str]]
"""A dim, the values along it, and attributes, as xarray takes them."""

DIMS = (
    "example",
    "site",
    "row",
    "other",
    "step",
    "source",
    "source_step",
    "seed",
    "measure",
    "factor",
    "direction",
    "optimizer",
    "noise",
)
"""Every dim a result of this toolkit may have."""


REFERENCES = {
    "base": "measure of the whole base run: after its step, or of its checkpoint",
    "source": "measure of the whole source run: after its step, or of its checkpoint",
    "untouched": "measure without any step",
    "coasted": "measure after a step with a zero gradient: momentum and decay alone",
}
"""The references beside every patched measure, and what they are."""


VARIABLES = ("effect", "patched", "attribution", "value", "residual", "nodes", *REFERENCES, "units")
"""What the result of a verb holds by name, its units among it."""


_MISSING: dict[str, tuple[type, Any]] = {
    "i": (np.int64, -1),
    "u": (np.int64, -1),
    "f": (np.float64, np.nan),
    "U": (np.str_, ""),
}


def coordinates(columns: Mapping[str, Sequence[Any]], dim: str) -> dict[str, Coordinate]:
    """Columns along one dim as coordinates with the dtypes that survive a file.

    Args:
        columns: by name, all of one length; `dim` holds the labels, each different. None becomes −1 among integers,
            "" among strings, NaN among other numbers.
        dim: of `DIMS`; sites always have `layer`, `head`, `component` and `level` afterwards.

    Raises:
        ValueError: a length, a dtype or a label is not as stated here.
    """
    found = typed(columns, dim)
    if dim == "site":
        for name, missing in SITE_COORDS.items():
            values = found[name][1] if name in found else np.full(found["site"][1].size, missing)
            found[name] = ("site", values, {"long_name": MEANINGS[name]})
    return found


def crossed(
    example_coords: Mapping[str, Sequence[Any]], along: str, other_coords: Mapping[str, Sequence[Any]]
) -> dict[str, Coordinate]:
    """The coordinates of examples, and those of the sites or rows that each of them is measured at.

    Args:
        example_coords: columns along `example`.
        along: the other dim.
        other_coords: columns along it.

    Raises:
        ValueError: a coordinate bears the name of one along the other dim, of a dim or of a variable; otherwise as
            `coordinates`.
    """
    expect_free("contrast", set(example_coords) - {"example"}, {*SITE_COORDS, *other_coords} - {along})
    expect_free(along, set(other_coords) - {along})
    return {**coordinates(example_coords, "example"), **coordinates(other_coords, along)}


def expect_free(owner: str, names: Iterable[str], of_sites: Iterable[str] = ()) -> None:
    """Raise a ValueError where a coordinate would replace what a result knows by its name.

    Args:
        owner: whose coordinates they are: "contrast", "site" or "row".
        names: theirs.
        of_sites: names of coordinates along the other dim.
    """
    taken = {
        **dict.fromkeys(of_sites, "a coordinate of sites"),
        **dict.fromkeys(VARIABLES, "a variable of the result"),
        **dict.fromkeys(DIMS, "a dim"),
    }
    for name in sorted(set(names) & set(taken)):
        raise ValueError(
            f"the coordinate {name!r} of a {owner} bears the name of {taken[name]}, whose place it would take. "
            f"Call it otherwise in coords, such as '{owner}_{name}'."
        )


def typed(columns: Mapping[str, Sequence[Any]], dim: str) -> dict[str, Coordinate]:
    """Coordinates along one dim, with the dtypes that survive a file: int64, float64, str."""
    if dim not in columns:
        raise ValueError(f"coordinates along '{dim}' lack the labels '{dim}'; found {sorted(columns)}")
    n = len(columns[dim])
    found: dict[str, Coordinate] = {}
    for name, column in columns.items():
        if len(column) != n:
            raise ValueError(f"coordinate '{name}' has length {len(column)}; '{dim}' has {n}")
        present = np.asarray([value for value in column if value is not None])
        kind = present.dtype.kind if present.size else np.asarray(SITE_COORDS.get(name, "")).dtype.kind
        if kind not in _MISSING or present.ndim != 1:
            shown = f"{present.dtype} of shape {present.shape}"
            raise ValueError(f"coordinate '{name}' holds {shown}; expected integers, floats or strings")
        dtype, missing = _MISSING[kind]
        found[name] = (dim, np.array([missing if value is None else value for value in column], dtype=dtype))
    labels = found[dim][1]
    unique, counts = np.unique(labels, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"labels of '{dim}' must differ; found more than once: {unique[counts > 1].tolist()}"
        )
    return found
