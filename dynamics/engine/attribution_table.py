"""The table of an attribution verb: attributions, their references and residuals, and the Dataset made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.engine.measuring import Measuring
from dynamics.engine.path_integral import Quadrature, StraightPath
from dynamics.engine.site_sums import SiteSums
from dynamics.measures import Measure
from dynamics.recipe import Contrast
from dynamics.results.labels import Labels
from dynamics.steps.fallbacks import ComputePaths

Array = npt.NDArray[np.float64]


class AttributionTable:
    """The numbers of one attribution verb, filled in contrast by contrast.

    Attributes:
        by_name: the measures.
        attribution: [n_measures, n_examples, n_parts].
        residual, nodes: [n_measures, n_examples].
        references: by name, [n_measures, n_examples].

    Args:
        measure: as the verb was called.
        n_examples, n_parts: sizes.
        references: names of the models that the measure is evaluated on beside the attributions.
    """

    def __init__(
        self,
        measure: Measure | Mapping[str, Measure],
        n_examples: int,
        n_parts: int,
        references: Sequence[str],
    ) -> None:
        self.by_name = measures.named(measure)
        self._measure = measure
        shape = (len(self.by_name), n_examples)
        self.attribution: Array = np.full((*shape, n_parts), np.nan)
        self.residual: Array = np.full(shape, np.nan)
        self.nodes = np.zeros(shape, dtype=np.int64)
        self.references: dict[str, Array] = {name: np.full(shape, np.nan) for name in references}

    def evaluate(
        self,
        measuring: Measuring,
        example: int,
        probe: Any,
        models: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Fill in the references of one example, measured on its probe."""
        for name, tensors in models.items():
            self.references[name][:, example] = measuring.one_model(tensors, probe)

    def integrate(
        self, example: int, path: StraightPath, end: Array, quadrature: Quadrature, sums: SiteSums
    ) -> None:
        """Fill in attributions, residuals and nodes of one example, whose `base` and `source` are known.

        Args:
            path: from the base model to the source model.
            end: what the measures give where the path ends, [n_measures]: the source, but for what is not moved.
            quadrature: at which nodes gradients are taken.
            sums: over the parts.
        """
        for m, (name, function) in enumerate(self.by_name.items()):
            start, stop = (self.references[which][m, example] for which in ("base", "source"))
            mean, self.nodes[m, example] = path.mean_gradient(name, function, end[m] - start, quadrature)
            of_sites, total = np.zeros((1, self.attribution.shape[-1])), 0.0
            for n, gradient in mean.items():
                elements = path.elements(n, gradient)
                sums.add(of_sites, n, elements[None])
                total += float(elements.sum())
            self.attribution[m, example] = of_sites[0]
            self.residual[m, example] = total - (stop - start)

    def labelled(
        self,
        verb: str,
        state: Checkpoint,
        contrasts: Sequence[Contrast],
        along: str,
        coords: Mapping[str, Sequence[Any]],
        paths: ComputePaths,
        **settings: Any,
    ) -> xr.Dataset:
        """The Dataset, with a dim `measure` where several were asked for."""
        facts = {**settings, "paths": paths.facts()}
        return Labels(self._measure, contrasts, verb, state.step, facts).attributions(
            self.attribution, self.residual, self.nodes, self.references, along, coords
        )
