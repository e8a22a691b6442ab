"""Measuring many models on one probe: under vmap where that gives what the models give one by one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.engine.memory import QUARTER, bytes_at_most, is_large
from dynamics.engine.resumed_forward import Beginning, beginning
from dynamics.measures import Measure
from dynamics.models.functional import call, evaluating
from dynamics.recipe import Recipe
from dynamics.steps.stacks import Stack
from dynamics.trees import copied

Array = npt.NDArray[np.float64]
Beginnings = dict[int, Beginning | None]


@dataclass
class Measuring:
    """Evaluates measures on stacks of models, in eval mode and with the checkpoint's random numbers.

    Measures of the logits are taken of all models at once, by vmap; functions of the user's one model at a time,
    each with tensors of its own, since they may keep or change what they see. Of the first stack one model is
    taken both ways: where vmap cannot take it (an LSTM, `.item()`, a branch on values) or finds something else,
    all are taken one at a time, as are those that follow a stack which it cannot take.

    Attributes:
        recipe: its model gives the code.
        checkpoint: whose random numbers a measure draws.
        by_name: the measures.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    by_name: Mapping[str, Measure]
    _at_once: bool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self._of_logits:
            self._at_once = False

    @property
    def _of_logits(self) -> bool:
        """Whether nothing but the model sees its tensors."""
        return all(isinstance(m, measures.LogitMeasure) for m in self.by_name.values())

    def __call__(self, models: Stack, probe: Any) -> Array:
        """[n_models, n_measures], rows of the probe averaged."""
        if self._at_once is None:
            return self._both_ways(models, probe)
        if self._at_once:
            try:
                return self._together(models, probe)
            except Exception:  # noqa: BLE001 (a module may write into what a later stack has in common)
                self._at_once = False
        return self._one_by_one(models, probe)

    def beside(self, models: Stack, probe: Any, base: Array, begun: Beginnings) -> Array:
        """The same of all but the first, the base model, of which `base` is known: [n_models − 1, n_measures].

        At once, kernels round by what is stacked: what the first model measures other than `base` is taken off the
        others, so that an exchange which changes nothing has no effect.

        Args:
            begun: of the same base model, what it computes before the first change, by the probe's id; filled here
                for large models, and not used again where it leads elsewhere.
        """
        if self._at_once is False:
            return self._one_by_one(models, probe, first=1)
        if id(probe) not in begun:
            begun[id(probe)] = self._beginning(models[0], probe)
        known, found = begun[id(probe)], None
        if known is not None:
            found = self._resumed(known, models, probe)
        if found is None or not np.allclose(found[0], base, *self._tolerance, equal_nan=True):
            begun[id(probe)] = None
            found = self(models, probe)
        exact: Array = base + (found[1:] - found[0])
        return exact

    def alone(self, tensors: Mapping[str, Tensor], probe: Any) -> Array:
        """One model's: [n_measures]."""
        own = copied(tensors, self.checkpoint.buffers if self._of_logits else tensors)
        with torch.no_grad(), evaluating(self.recipe.model), self.checkpoint.random_state():
            found = call(self._evaluate, self.recipe.model, own, probe)
        return found.double().cpu().numpy()

    def _one_by_one(self, models: Stack, probe: Any, first: int = 0) -> Array:
        return np.stack([self.alone(models[i], probe) for i in range(first, len(models))])

    def _both_ways(self, models: Stack, probe: Any) -> Array:
        """A later stack may have other tensors stacked, so here all parameters are."""
        alike = {n: t for n, t in models.shared.items() if n in self.checkpoint.parameters}
        apart = {n: t.expand(len(models), *t.shape) for n, t in alike.items()}
        shared = {n: t for n, t in models.shared.items() if n not in alike}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                together = self._together(Stack(len(models), shared, {**apart, **models.stacked}), probe)
        except Exception:  # noqa: BLE001 (the loop says what is wrong, if anything is)
            self._at_once = False
        else:
            last = self.alone(models[len(models) - 1], probe)
            self._at_once = bool(np.allclose(together[-1], last, *self._tolerance, equal_nan=True))
        return together if self._at_once else self._one_by_one(models, probe)

    @property
    def _tolerance(self) -> tuple[float, float]:
        """Relative and absolute: what kernels may round differently."""
        dtypes = {p.dtype for p in self.checkpoint.parameters.values() if p.is_floating_point()}
        eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-7)
        return eps**0.7, eps**0.7

    def _together(self, models: Stack, probe: Any) -> Array:
        buffers = self.checkpoint.buffers  # a forward pass may write into them
        shared, stacked = copied(models.shared, buffers), copied(models.stacked, buffers)

        def of_one(own: dict[str, Tensor]) -> Tensor:
            return call(self._evaluate, self.recipe.model, {**shared, **own}, probe)

        with torch.no_grad(), evaluating(self.recipe.model), self.checkpoint.random_state():
            if not models.stacked:
                return of_one({}).double().cpu().numpy()[None].repeat(len(models), 0)
            found = torch.vmap(of_one, randomness="same")(stacked)
        return found.double().cpu().numpy()

    def _beginning(self, base: Mapping[str, Tensor], probe: Any) -> Beginning | None:
        """The base model's forward pass, where models are so large that to keep it pays."""
        if not (self._of_logits and self._at_once and is_large(self.checkpoint.parameters)):
            return None

        def run(tensors: Mapping[str, Tensor]) -> Tensor:
            return call(self._evaluate, self.recipe.model, tensors, probe)

        device = next(iter(self.checkpoint.parameters.values())).device
        try:
            with evaluating(self.recipe.model), self.checkpoint.random_state():
                tensors = copied(base, self.checkpoint.buffers)
                return beginning(run, self.recipe.model, tensors, bytes_at_most(device, QUARTER))
        except Exception:  # noqa: BLE001 (all of every pass is then taken)
            return None

    def _resumed(self, begun: Beginning, models: Stack, probe: Any) -> Array | None:
        try:
            with begun.resumed(self.recipe.model, models.stacked):
                return self._together(models, probe)
        except Exception:  # noqa: BLE001 (all of the pass is then taken)
            return None

    def _evaluate(self, model: Any, batch: Any) -> Tensor:
        return measures.evaluate(self.by_name, model, batch)
