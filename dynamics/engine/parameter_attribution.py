"""A measure's change between two models, divided among their parameters, contrast by contrast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics.engine.attribution_table import AttributionTable
from dynamics.engine.measure_gradients import MeasureGradients
from dynamics.engine.measuring import Measuring
from dynamics.engine.path_integral import Quadrature, StraightPath
from dynamics.engine.site_sums import site_sums
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import site_columns
from dynamics.sites import Site
from dynamics.steps.fallbacks import ComputePaths

Tensors = Mapping[str, Tensor]


class ParameterAttribution:
    """Attributions of `attribute_step` and `attribute_parameters`, which differ in the models they compare.

    Args:
        verb: which of them.
        recipe, contrasts, sites, measure: as the verb was called.
        state: whose random numbers a measure draws.
        moved: shapes of the parameters that are moved from base to source, by name.
        references: names of the models that the measure is evaluated on, `base` and `source` among them.
        quadrature: at which nodes gradients are taken.
    """

    def __init__(
        self,
        verb: str,
        recipe: Recipe,
        state: Checkpoint,
        contrasts: Sequence[Contrast],
        sites: Sequence[Site],
        measure: Measure | Mapping[str, Measure],
        moved: Mapping[str, torch.Size],
        references: Sequence[str],
        quadrature: Quadrature,
    ) -> None:
        self.paths = ComputePaths(verb)
        self._verb, self._state, self._contrasts, self._sites = verb, state, contrasts, sites
        self._moved, self._quadrature = moved, quadrature
        self._table = AttributionTable(measure, len(contrasts), len(sites), references)
        self._sums = site_sums(sites, moved)
        self._measuring = Measuring(recipe, state, self._table.by_name, self.paths)
        self._gradients = MeasureGradients(recipe, state, self.paths)

    def evaluate(self, example: int, probe: Any, models: Mapping[str, Tensors]) -> None:
        """Measure the references of one example on its probe."""
        self._table.evaluate(self._measuring, example, probe, models)

    def divide(
        self, example: int, name: str, probe: Any, base: Tensors, source: Tensors, unmoved: Tensors
    ) -> None:
        """Divide one example's change from base to source, whose measures are known, among the sites.

        Args:
            example: its number.
            name: how errors call it.
            probe: what is measured.
            base, source: the models.
            unmoved: the base's tensors that stay all along the path; where the source has others, what they do is
                left in the residual.
        """
        end = self._table.references["source"][:, example]
        if any(not torch.equal(source[n], tensor) for n, tensor in unmoved.items()):
            end = self._measuring.one_model({**source, **unmoved}, probe)
        path = StraightPath(self._gradients, base, source, self._moved, probe, name)
        self._table.integrate(example, path, end, self._quadrature, self._sums)

    def labelled(self, **settings: Any) -> xr.Dataset:
        """The Dataset of all examples."""
        columns = site_columns(self._sites)
        return self._table.labelled(
            self._verb, self._state, self._contrasts, "site", columns, self.paths, **settings
        )
