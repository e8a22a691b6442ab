"""Results as labelled datasets: the one place that knows their dims, units and files."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from dynamics.results.provenance_json import common, parse, paths_taken
from dynamics.site_coordinates import MEANINGS
from dynamics.site_coordinates import PLACEBO as PLACEBO
from dynamics.site_coordinates import SITE_COORDS as SITE_COORDS

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


def effects(
    patched: npt.ArrayLike,
    references: Mapping[str, npt.ArrayLike],
    example_coords: Mapping[str, Sequence[Any]],
    site_coords: Mapping[str, Sequence[Any]],
    measure_names: Sequence[str] | None,
    units: str | Sequence[str],
    provenance: str,
) -> xr.Dataset:
    """Label the numbers of one patching verb.

    Args:
        patched: the measure after each patched step, [n_examples, n_sites], or
            [n_measures, n_examples, n_sites] with `measure_names`.
        references: `base` and `source`, and where a step is taken `untouched` and `coasted`:
            [n_examples], or [n_measures, n_examples].
        example_coords: columns of length n_examples; `example` holds the labels, each different.
        site_coords: columns of length n_sites; `site` holds the labels, each different. `layer`, `head`,
            `component` and `level` are always there afterwards. None becomes −1 among integers, "" among
            strings, NaN among other numbers.
        measure_names: one per measure; None for a single measure without a dim.
        units: the measure's units, or one per measure (then a coordinate `units` along `measure`).
        provenance: a JSON object, as from `provenance`.

    Returns:
        `effect` (= patched − base) and `patched` [(measure,) example, site]; the references
        [(measure,) example]. Integer coordinates are int64.

    Raises:
        ValueError: a shape, a length or a name is not as stated here; says what was found and expected.
    """
    if absent := sorted({"base", "source"} - set(references)):
        raise ValueError(f"references lack {absent}; expected at least base and source")
    frame = _Frame.of("site", example_coords, site_coords, measure_names, units)
    values = frame.expect("patched", patched, frame.dims)
    known = frame.references(references)
    parse(provenance)
    effect = values - known["base"][1][..., None]
    variables = {
        "effect": (frame.dims, effect, {"long_name": "patched − base", **frame.attrs}),
        "patched": (frame.dims, values, {"long_name": "measure after the patched step", **frame.attrs}),
        **known,
    }
    return xr.Dataset(variables, coords=frame.coords, attrs={"provenance": provenance})


def attributions(
    attribution: npt.ArrayLike,
    residual: npt.ArrayLike | None,
    nodes: npt.ArrayLike,
    references: Mapping[str, npt.ArrayLike],
    example_coords: Mapping[str, Sequence[Any]],
    along: str,
    coords: Mapping[str, Sequence[Any]],
    measure_names: Sequence[str] | None,
    units: str | Sequence[str],
    provenance: str,
) -> xr.Dataset:
    """Label the numbers of one attribution verb.

    Args:
        attribution: of each part, [n_examples, n_parts], or [n_measures, n_examples, n_parts].
        residual: what the attributions of all parts sum to, less the change that was attributed:
            [n_examples], or [n_measures, n_examples]; None where that is not known.
        nodes: gradients of the measure that were averaged; [n_examples], or [n_measures, n_examples].
        along: the dim of the parts, "site" or "row".
        coords: columns of length n_parts; `along` holds the labels.
        references, example_coords, measure_names, units, provenance: as `effects`; no reference must be there.

    Returns:
        `attribution` [(measure,) example, along]; `residual` where it is known, `nodes` and the references
        [(measure,) example].

    Raises:
        ValueError: as `effects`.
    """
    frame = _Frame.of(along, example_coords, coords, measure_names, units)
    few = frame.dims[:-1]
    parse(provenance)
    variables = {
        "attribution": (
            frame.dims,
            frame.expect("attribution", attribution, frame.dims),
            {"long_name": f"change of the measure due to each {along}", **frame.attrs},
        ),
        "nodes": (
            few,
            frame.expect("nodes", nodes, few),
            {"long_name": "gradients of the measure averaged", "units": "1"},
        ),
        **frame.references(references),
    }
    if residual is not None:
        described = {"long_name": "sum of all attributions − change attributed", **frame.attrs}
        variables["residual"] = few, frame.expect("residual", residual, few), described
    return xr.Dataset(variables, coords=frame.coords, attrs={"provenance": provenance})


def account(
    attribution: npt.ArrayLike,
    value: npt.ArrayLike,
    residual: npt.ArrayLike,
    nodes: npt.ArrayLike,
    steps: Sequence[int],
    sources: Sequence[str] | None,
    example_coords: Mapping[str, Sequence[Any]],
    site_coords: Mapping[str, Sequence[Any]],
    measure_names: Sequence[str] | None,
    units: str | Sequence[str],
    partition: bool,
    provenance: str,
) -> xr.Dataset:
    """Label the numbers of an account of training.

    Args:
        attribution: [(n_measures,) n_steps, (n_sources,) n_sites, n_examples].
        value, residual, nodes: [(n_measures,) n_steps, n_examples].
        steps: of the entries, the first where the stretch begins.
        sources: labels; None without that dim.
        partition: whether the sites are a partition of the trained parameters.
        example_coords, site_coords, measure_names, units, provenance: as `effects`.

    Returns:
        `attribution`, `value`, `residual`, `nodes`.

    Raises:
        ValueError: as `effects`.
    """
    frame = _Frame.of("site", example_coords, site_coords, measure_names, units)
    parse(provenance)
    sizes = {**frame.sizes, "step": len(steps)}
    coords = {**frame.coords, **_columns({"step": list(steps)}, "step")}
    measure = tuple(dim for dim in frame.dims if dim == "measure")
    few, many = (*measure, "step", "example"), (*measure, "step", "site", "example")
    if sources is not None:
        many = (*measure, "step", "source", "site", "example")
        sizes["source"], coords = len(sources), {**coords, **_columns({"source": list(sources)}, "source")}
    whole = replace(frame, sizes=sizes)
    described = {
        "value": (value, "measure along the way", frame.attrs),
        "residual": (residual, "sum over all parameters − change of the measure", frame.attrs),
        "nodes": (nodes, "gradients of the measure averaged in a step, at most", {"units": "1"}),
    }
    variables = {
        "attribution": (
            many,
            whole.expect("attribution", attribution, many),
            {"long_name": "change of the measure since the entry before", **frame.attrs},
        ),
        **{
            name: (few, whole.expect(name, values, few), {"long_name": words, **attrs})
            for name, (values, words, attrs) in described.items()
        },
    }
    return xr.Dataset(variables, coords=coords, attrs={"provenance": provenance, "partition": int(partition)})


_Variable = tuple[tuple[str, ...], npt.NDArray[Any], dict[str, str]]


@dataclass(frozen=True)
class _Frame:
    """The dims, sizes, coordinates and units of one result, before its numbers."""

    sizes: dict[str, int]
    coords: dict[str, Coordinate]
    attrs: dict[str, str]

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @classmethod
    def of(
        cls,
        along: str,
        example_coords: Mapping[str, Sequence[Any]],
        other_coords: Mapping[str, Sequence[Any]],
        measure_names: Sequence[str] | None,
        units: str | Sequence[str],
    ) -> _Frame:
        coords = crossed(example_coords, along, other_coords)
        sizes = {name: coords[name][1].size for name in ("example", along)}
        if measure_names is not None:
            coords.update(_columns({"measure": list(measure_names)}, "measure"))
            sizes = {"measure": len(measure_names), **sizes}
        if isinstance(units, str):
            return cls(sizes, coords, {"units": units})
        if len(units) != len(measure_names or ()):
            raise ValueError(
                f"found {len(units)} units for measures {measure_names}; expected one string, or one each"
            )
        coords["units"] = ("measure", np.asarray(list(units), dtype=np.str_))
        return cls(sizes, coords, {})

    def expect(self, name: str, values: npt.ArrayLike, dims: tuple[str, ...]) -> npt.NDArray[Any]:
        """The values as an array of these dims."""
        array, shape = np.asarray(values), tuple(self.sizes[dim] for dim in dims)
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; expected {shape} for [{', '.join(dims)}]")
        return array

    def references(self, references: Mapping[str, npt.ArrayLike]) -> dict[str, _Variable]:
        """The references as variables, in their usual order."""
        if unknown := sorted(set(references) - set(REFERENCES)):
            raise ValueError(f"found references {unknown}; expected some of {sorted(REFERENCES)}")
        dims = self.dims[:-1]
        return {
            name: (dims, self.expect(name, references[name], dims), {"long_name": described, **self.attrs})
            for name, described in REFERENCES.items()
            if name in references
        }


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


def is_account(dataset: xr.Dataset) -> bool:
    """Whether a result is an account of training, with steps of its own."""
    return "partition" in dataset.attrs


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


def tidy(dataset: xr.Dataset) -> pd.DataFrame:
    """A result as a data frame: a row for each measure, example and site; a column for each variable and label."""
    return dataset.to_dataframe().reset_index()


def units(dataset: xr.Dataset, name: str) -> str:
    """The units of one variable: of its only or selected measure; "" where they are unknown or mixed."""
    array = dataset[name]
    if "units" in array.attrs:
        return str(array.attrs["units"])
    known = np.unique(array.coords["units"].values) if "units" in array.coords else np.array([])
    return str(known[0]) if known.size == 1 else ""


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
    labels = _columns({dim: list(values)}, dim)[dim]
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


def coordinates(columns: Mapping[str, Sequence[Any]], dim: str) -> dict[str, Coordinate]:
    """Columns along one dim as coordinates with the dtypes that survive a file.

    Args:
        columns: by name, all of one length; `dim` holds the labels, each different. None becomes −1 among integers,
            "" among strings, NaN among other numbers.
        dim: of `DIMS`; sites always have `layer`, `head`, `component` and `level` afterwards.

    Raises:
        ValueError: a length, a dtype or a label is not as stated here.
    """
    found = _columns(columns, dim)
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


def _columns(columns: Mapping[str, Sequence[Any]], dim: str) -> dict[str, Coordinate]:
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
