"""Results as labelled datasets: what the numbers of a verb are made into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from dynamics.results.coordinate_columns import REFERENCES, Coordinate, crossed, typed
from dynamics.results.provenance_json import parse


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
    coords = {**frame.coords, **typed({"step": list(steps)}, "step")}
    measure = tuple(dim for dim in frame.dims if dim == "measure")
    few, many = (*measure, "step", "example"), (*measure, "step", "site", "example")
    if sources is not None:
        many = (*measure, "step", "source", "site", "example")
        sizes["source"], coords = len(sources), {**coords, **typed({"source": list(sources)}, "source")}
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
            coords.update(typed({"measure": list(measure_names)}, "measure"))
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
