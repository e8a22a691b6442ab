"""Labels: whose numbers a verb's result holds, and the Dataset made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import xarray as xr

from dynamics import measures, results
from dynamics.measures import Measure
from dynamics.recipe import Contrast
from dynamics.results import coordinate_columns
from dynamics.sites import Site

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Labels:
    """The examples and measures of one call of a verb. Numbers have an axis of measures first, even for one.

    Attributes:
        measure: as the verb was called; several become the dim `measure`.
        contrasts: the examples, in order.
        verb: its name, for provenance.
        step: of the checkpoint.
        settings: what else provenance records.
    """

    measure: Measure | Mapping[str, Measure]
    contrasts: Sequence[Contrast]
    verb: str
    step: int | None
    settings: Mapping[str, Any]

    def effects(
        self, patched: Numbers, references: Mapping[str, Numbers], sites: Sequence[Site]
    ) -> xr.Dataset:
        """Of a patching verb: `patched` [n_measures, n_examples, n_sites], references [n_measures, n_examples]."""
        return results.effects(
            patched=self._shown(patched),
            references={name: self._shown(values) for name, values in references.items()},
            site_coords=site_columns(sites),
            **self._shared,
        )

    def attributions(
        self,
        attribution: Numbers,
        residual: Numbers | None,
        nodes: Numbers,
        references: Mapping[str, Numbers],
        along: str,
        coords: Mapping[str, Sequence[Any]],
    ) -> xr.Dataset:
        """Of an attribution verb: `attribution` [n_measures, n_examples, n_parts], the rest without parts."""
        return results.attributions(
            attribution=self._shown(attribution),
            residual=None if residual is None else self._shown(residual),
            nodes=self._shown(nodes),
            references={name: self._shown(values) for name, values in references.items()},
            along=along,
            coords=coords,
            **self._shared,
        )

    def account(
        self,
        attribution: Numbers,
        value: Numbers,
        residual: Numbers,
        nodes: Numbers,
        steps: Sequence[int],
        sources: Sequence[str] | None,
        sites: Sequence[Site],
        partition: bool,
    ) -> xr.Dataset:
        """Of `attribute_training`: `attribution` [n_measures, n_steps, n_sources, n_sites, n_examples], the rest
        [n_measures, n_steps, n_examples]; without sources n_sources is 1."""
        return results.account(
            attribution=self._shown(attribution if sources is not None else attribution[:, :, 0]),
            value=self._shown(value),
            residual=self._shown(residual),
            nodes=self._shown(nodes),
            steps=steps,
            sources=sources,
            site_coords=site_columns(sites),
            partition=partition,
            **self._shared,
        )

    def _shown(self, values: Numbers) -> Numbers:
        return values if isinstance(self.measure, Mapping) else values[0]

    @property
    def _shared(self) -> dict[str, Any]:
        by_name = measures.named(self.measure)
        units = [str(getattr(m, "units", "")) for m in by_name.values()]
        several = isinstance(self.measure, Mapping)
        return {
            "example_coords": example_columns(self.contrasts),
            "measure_names": list(by_name) if several else None,
            "units": units if several else units[0],
            "provenance": results.provenance(
                verb=self.verb, step=self.step, measure=list(by_name), **self.settings
            ),
        }


Columns = dict[str, list[str | int | float | None]]


def example_columns(contrasts: Sequence[Contrast]) -> Columns:
    """The coordinates of contrasts; those without a label are numbered."""
    return columns([{"example": f"contrast {i}", **c.coords} for i, c in enumerate(contrasts)])


def site_columns(sites: Sequence[Site]) -> Columns:
    """The labels and coordinates of sites."""
    coordinate_columns.expect_free("site", {name for s in sites for name in s.coords})
    return columns([{"site": s.label, **s.coords} for s in sites])


def check_coordinates(contrasts: Sequence[Contrast], sites: Sequence[Site]) -> None:
    """Raise a ValueError where the coordinates of contrasts and sites cannot stand in one result."""
    coordinate_columns.crossed(example_columns(contrasts), "site", site_columns(sites))


def columns(rows: Sequence[Mapping[str, str | int | float]]) -> Columns:
    """Rows of labels as columns; a label that a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
