"""Results put together: along a new dim, stretch after stretch, one example less another."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
import xarray as xr

from dynamics.results.coordinate_columns import DIMS, typed
from dynamics.results.provenance_json import common, parse, paths_taken


def concat(datasets: Iterable[xr.Dataset], dim: str, values: Sequence[int | float | str]) -> xr.Dataset:
    """Join datasets along a new dim, such as step, seed or optimizer.

    All must have the same variables, units and labels (`join="exact"`: nothing is filled in). Coordinates
    along `site` stay along `site`; another coordinate gains the new dim only where the datasets differ in
    it (an alias stands for another integer in another run). A scalar coordinate called `dim` gives way to
    `values`. The provenance keeps what all of them share, and every path that one of them took.

    Args:
        datasets: at least one, length n.
        dim: a dim that none of them has yet.
        values: n different labels, all integers, all floats or all strings.

    Raises:
        ValueError: as above; says which dataset, variable or coordinate differs.
    """
    parts = list(datasets)
    if not parts or len(parts) != len(values):
        raise ValueError(
            f"found {len(parts)} datasets and {len(values)} values of '{dim}'; expected one each"
        )
    if dim not in DIMS:
        raise ValueError(f"'{dim}' is not a dim of this toolkit; expected one of {DIMS}")
    labels = typed({dim: list(values)}, dim)[dim]
    first = parts[0]
    for label, part in zip(values, parts, strict=True):
        if dim in part.dims:
            raise ValueError(
                f"the dataset for {dim} {label!r} has the dim '{dim}' already; expected a new dim"
            )
        _expect_alike(first, part, f"the dataset for {dim} {label!r}")
    facts = [parse(part.attrs["provenance"]) for part in parts if "provenance" in part.attrs]
    bare = [part.drop_vars(dim, errors="ignore") for part in parts]
    names = [str(name) for name in first.coords if name != dim]
    differing = [name for name in names if not all(_same(first, part, name) for part in parts)]
    joined = xr.concat(
        bare, dim, data_vars="all", coords=differing, compat="equals", join="exact", combine_attrs="override"
    ).assign_coords({dim: labels})
    shared = {
        key: value
        for key, value in first.attrs.items()
        if key != "provenance" and all(part.attrs.get(key) == value for part in parts)
    }
    if len(facts) == len(parts):
        kept: dict[str, Any] = functools.reduce(common, facts)
        shared["provenance"] = json.dumps({**kept, **paths_taken(facts)}, sort_keys=True)
    joined.attrs = shared
    return joined


def joined(accounts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Accounts of stretches that meet as the account of all of them.

    A source that one of them did not meet wrote nothing there. Each stretch counts momentum from its own beginning
    as `before`.

    Args:
        accounts: of `attribute_training`, in order; each begins at the step where the one before it ends.

    Raises:
        ValueError: two of them do not meet, or their values there differ.
    """
    for one, other in pairwise(accounts):
        last, first = int(one["step"][-1]), int(other["step"][0])
        ends = one["value"].isel(step=-1, drop=True), other["value"].isel(step=0, drop=True)
        if last != first or not ends[0].equals(ends[1]):
            raise ValueError(
                f"a stretch that ends at step {last} is followed by one that begins at step {first}; expected "
                "stretches of one run that meet, with equal values where they do."
            )
    parts = [one if i == 0 else one.isel(step=slice(1, None)) for i, one in enumerate(accounts)]
    if "source" in accounts[0].dims:
        met = dict.fromkeys(str(label) for one in accounts for label in one["source"].values[:-2])
        labels = [*met, *accounts[0]["source"].values[-2:]]
        parts = [part.reindex(source=labels, fill_value=0.0) for part in parts]
    return xr.concat(
        parts,
        "step",
        data_vars="minimal",
        coords="minimal",
        compat="equals",
        join="exact",
        combine_attrs="override",
    )


def difference(dataset: xr.Dataset, one: str, other: str) -> xr.Dataset:
    """One example less another, as an example called "one − other": attributions are linear in the measure.

    Args:
        dataset: a result with the dim `example`.
        one, other: labels of that dim.

    Returns:
        All variables with the dim `example` as differences, without that dim; `nodes` as the larger of the two.
    """
    with xr.set_options(keep_attrs=True):  # type: ignore[no-untyped-call]
        found = dataset.sel(example=one, drop=True) - dataset.sel(example=other, drop=True)
    if "nodes" in dataset:
        found["nodes"] = dataset["nodes"].sel(example=[one, other]).max("example", keep_attrs=True)
    return found.assign_coords(example=f"{one} − {other}").assign_attrs(dataset.attrs)


def folded(dataset: xr.Dataset, dim: str, values: Sequence[str], site_labels: Sequence[str]) -> xr.Dataset:
    """A dataset whose sites stand in groups, one for each value of a further dim, with that dim made.

    Args:
        dataset: n_sites * len(values) sites, those of one group side by side; other coordinates of a group's
            sites agree.
        dim: the new dim, on all variables that have the dim `site`.
        values: its labels.
        site_labels: one for each group, length n_sites.
    """
    parts = [
        dataset.isel(site=slice(i, None, len(values))).assign_coords(site=("site", list(site_labels)))
        for i in range(len(values))
    ]
    along = pd.Index(values, name=dim)
    joined = {
        name: xr.concat([part[name] for part in parts], along, coords="minimal", compat="override")
        .transpose(..., dim)
        .assign_attrs(array.attrs)
        for name, array in dataset.data_vars.items()
        if "site" in array.dims
    }
    return parts[0].drop_vars(joined).assign(joined)


def _expect_alike(first: xr.Dataset, other: xr.Dataset, label: str) -> None:
    """Same variables, dims, units and labels, and the same coordinates along `site`."""

    def described(dataset: xr.Dataset) -> list[tuple[str, tuple[str, ...], str]]:
        arrays = sorted(dataset.data_vars.items(), key=lambda item: str(item[0]))
        return [
            (str(key), tuple(map(str, array.dims)), array.attrs.get("units", "")) for key, array in arrays
        ]

    if described(first) != described(other):
        raise ValueError(f"{label} has {described(other)}; expected, as in the first, {described(first)}")
    if set(first.coords) != set(other.coords):
        found, expected = (sorted(map(str, dataset.coords)) for dataset in (other, first))
        raise ValueError(f"{label} has the coordinates {found}; expected, as in the first, {expected}")
    for name, coord in first.coords.items():
        if (name in (*first.dims, "units") or "site" in coord.dims) and not _same(first, other, str(name)):
            raise ValueError(
                f"{label} differs in '{name}' along {list(coord.dims)}; expected exactly the first's"
            )


def _same(first: xr.Dataset, other: xr.Dataset, name: str) -> bool:
    """Whether a variable has the same values over the same dims, whatever its own coordinates."""
    return xr.DataArray(first.variables[name]).equals(xr.DataArray(other.variables[name]))
