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
        contrast: Contrast,
        models: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Fill in the references of one example."""
        for name, tensors in models.items():
            self.references[name][:, example] = measuring.one_model(tensors, contrast.probe)

    def labelled(
        self,
        verb: str,
        state: Checkpoint,
        contrasts: Sequence[Contrast],
        along: str,
        coords: Mapping[str, Sequence[Any]],
        paths: ComputePaths,
    ) -> xr.Dataset:
        """The Dataset, with a dim `measure` where several were asked for."""
        return Labels(self._measure, contrasts, verb, state.step, {"paths": paths.facts()}).attributions(
            self.attribution, self.residual, self.nodes, self.references, along, coords
        )
