"""Measuring many models on one probe: under vmap where that gives what the models give one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.engine.resumed_forward import CachedPrefix, cache_prefix
from dynamics.engine.side_effects import nothing_written
from dynamics.engine.stack_memory import QUARTER, is_large, memory_budget
from dynamics.measures import Measure
from dynamics.models.functional import call_with, eval_mode, unfused_attention
from dynamics.recipe import Recipe
from dynamics.steps.fallbacks import ComputePaths, out_of_memory, reason
from dynamics.steps.stacks import Stack
from dynamics.trees import copied

T = TypeVar("T")
Array = npt.NDArray[np.float64]
CachedPrefixes = dict[int, CachedPrefix | None]
"""By the probe's id: what a base model computes before the first change; None where that leads elsewhere."""

ONE_BY_ONE = "one model at a time"


@dataclass
class Measuring:
    """Evaluates measures on stacks of models, in eval mode and with the checkpoint's random numbers.

    All models of a stack are measured at once, by vmap. Of the first stack one model is taken both ways: where vmap
    cannot take it (an LSTM, `.item()`, a branch on values) or finds something else, and where a function of the
    user's writes into what it sees or closes over, all are taken one at a time, as are those that follow a stack
    which it cannot take; such a function then gets tensors of its own for each. Where memory runs out a stack is
    measured in halves.

    Attributes:
        recipe: its model gives the code.
        checkpoint: whose random numbers a measure draws.
        by_name: the measures.
        paths: where it is noted which way models were measured.
        call: calls a function of (model, batch) with a model's tensors, as `call_with` does.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    by_name: Mapping[str, Measure]
    paths: ComputePaths = field(default_factory=ComputePaths)
    call: Callable[..., Any] = call_with
    _vmap_holds: bool | None = field(default=None, init=False)

    @property
    def _of_logits(self) -> bool:
        """Whether nothing but the model sees its tensors."""
        return all(isinstance(m, measures.LogitMeasure) for m in self.by_name.values())

    def __call__(self, models: Stack, probe: Any) -> Array:
        """Measure every model: [n_models, n_measures], rows of the probe averaged."""
        if self._vmap_holds is None:
            return self._both_ways(models, probe)
        if self._vmap_holds:
            try:
                found = self._by_vmap(models, probe)
            except Exception as error:  # noqa: BLE001 (a module may write into what a later stack has in common)
                self._one_by_one_from_now_on(error)
            else:
                self._refuse_all_nan(found, models, probe)
                return found
        return self._one_by_one(models, probe)

    def variants_of(self, models: Stack, probe: Any, base: Array, prefixes: CachedPrefixes | None) -> Array:
        """Measure the variants of a base model whose own values `base` are known: [n_models − 1, n_measures].

        At once, kernels round by what is stacked: what the first model measures other than `base` is taken off the
        others, so that an exchange which changes nothing has no effect.

        Args:
            prefixes: of the same base model; filled here for large models, whose forward passes are resumed from
                what came before the first change. None takes whole passes.
        """
        if self._vmap_holds is False:
            return self._one_by_one(models, probe, first=1)
        prefixes = {id(probe): None} if prefixes is None else prefixes
        if id(probe) not in prefixes:
            prefixes[id(probe)] = self._prefix(models[0], probe)
        known, found = prefixes[id(probe)], None
        if known is not None:
            found = self._resumed(known, models, probe)
        if found is None or not np.allclose(found[0], base, *self.tolerance, equal_nan=True):
            if found is not None:
                self.paths.fell_back("forward passes", "whole", "resumed passes measured something else")
            prefixes[id(probe)] = None
            found = self(models, probe)
        self._refuse_all_nan(found, models, probe)
        exact: Array = np.where(found[0] == base, found[1:], base + (found[1:] - found[0]))
        return exact

    def one_model(self, tensors: Mapping[str, Tensor], probe: Any) -> Array:
        """Measure one model by itself: [n_measures].

        Raises:
            MeasureError: a measure gives no number for each row, or none that is a number.
        """
        found = self._call(self._evaluate, tensors, probe).double().cpu().numpy()
        self._refuse_all_nan(found[None], [tensors], probe)
        return found

    def _call(self, function: Callable[[Any, Any], T], tensors: Mapping[str, Tensor], probe: Any) -> T:
        own = self._own(tensors)
        with torch.no_grad(), eval_mode(self.recipe.model), self.checkpoint.random_state():
            return self.call(function, self.recipe.model, own, probe)  # type: ignore[no-any-return]

    def _own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, those as copies into which a forward pass or a function of the user's may write."""
        return copied(tensors, self.checkpoint.buffers if self._of_logits else tensors)

    def _refuse_all_nan(
        self, found: Array, models: Sequence[Mapping[str, Tensor]] | Stack, probe: Any
    ) -> None:
        for i in np.flatnonzero(np.isnan(found).any(-1)).tolist():
            self._call(partial(measures.refuse_all_nan, self.by_name), models[i], probe)

    def _one_by_one(self, models: Stack, probe: Any, first: int = 0) -> Array:
        each = [self._call(self._evaluate, models[i], probe) for i in range(first, len(models))]
        found: Array = torch.stack(each).double().cpu().numpy()
        self._refuse_all_nan(found, models.part(first, len(models)), probe)
        return found

    def _one_by_one_from_now_on(self, why: BaseException | str) -> None:
        self._vmap_holds = False
        self.paths.fell_back("measures", ONE_BY_ONE, why if isinstance(why, str) else reason(why))

    def _both_ways(self, models: Stack, probe: Any) -> Array:
        """Measure a first stack by vmap, its first model by itself too: vmap holds where they agree.

        A later stack may have other tensors stacked, so here all parameters are.
        """
        first = self.one_model(models[0], probe)
        alike = {n: t for n, t in models.shared.items() if n in self.checkpoint.parameters}
        apart = {n: t.expand(len(models), *t.shape) for n, t in alike.items()}
        shared = {n: t for n, t in models.shared.items() if n not in alike}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                together = self._by_vmap(Stack(len(models), shared, {**apart, **models.stacked}), probe)
        except Exception as error:  # noqa: BLE001 (an error of the user's own comes back one by one)
            self._one_by_one_from_now_on(error)
        else:
            if np.allclose(together[0], first, *self.tolerance, equal_nan=True):
                self._refuse_all_nan(together, models, probe)
                self._vmap_holds = True
                self.paths.took("measures", "vmap over models")
                return together if len(models) > 1 else first[None]
            self._one_by_one_from_now_on("vmap measured something else than one model by itself")
        return np.stack([first, *(self.one_model(models[i], probe) for i in range(1, len(models)))])

    @property
    def tolerance(self) -> tuple[float, float]:
        """Relative and absolute: what kernels may round differently."""
        dtypes = {p.dtype for p in self.checkpoint.parameters.values() if p.is_floating_point()}
        eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-7)
        return eps**0.7, eps**0.7

    def _by_vmap(self, models: Stack, probe: Any) -> Array:
        """Where memory runs out, both halves of the stack by themselves."""
        try:
            return self._vmapped(models, probe)
        except Exception as error:
            if len(models) < 2 or not out_of_memory(error):
                raise
            self.paths.fell_back("measures", "fewer models at a time", reason(error))
        middle = len(models) // 2
        halves = models.part(0, middle), models.part(middle, len(models))
        return np.concatenate([self._by_vmap(half, probe) for half in halves])

    def _vmapped(self, models: Stack, probe: Any) -> Array:
        shared, stacked = self._own(models.shared), self._own(models.stacked)

        def of_one(own: dict[str, Tensor]) -> Tensor:
            return self.call(self._evaluate, self.recipe.model, {**shared, **own}, probe)  # type: ignore[no-any-return]

        parameters = [t for n, t in (*shared.items(), *stacked.items()) if n not in self.checkpoint.buffers]
        with (
            torch.no_grad(),
            eval_mode(self.recipe.model),
            unfused_attention(),
            self.checkpoint.random_state(),
            self._watched(probe, parameters),
        ):
            if not models.stacked:
                return of_one({}).double().cpu().numpy()[None].repeat(len(models), 0)
            found = torch.vmap(of_one, randomness="same")(stacked)
        return found.double().cpu().numpy()

    def _watched(self, probe: Any, parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Inside, functions are called for several models at once; measures of the logits write nothing."""
        if self._of_logits:
            return nullcontext()
        return nothing_written(self.recipe.model, self.by_name.values(), probe, parameters)

    def _prefix(self, base: Mapping[str, Tensor], probe: Any) -> CachedPrefix | None:
        """The base model's forward pass, where models are so large that to keep it pays."""
        if not (self._vmap_holds and is_large(self.checkpoint.parameters)):
            return None

        def run(tensors: Mapping[str, Tensor]) -> Tensor:
            return call_with(self._evaluate, self.recipe.model, tensors, probe)

        device = next(iter(self.checkpoint.parameters.values())).device
        try:
            with eval_mode(self.recipe.model), self.checkpoint.random_state():
                tensors = copied(base, self.checkpoint.buffers)
                kept = cache_prefix(run, self.recipe.model, tensors, memory_budget(device, QUARTER))
        except Exception as error:  # noqa: BLE001 (whole passes are then taken, which raise what recurs)
            self.paths.fell_back("forward passes", "whole", reason(error))
            return None
        if kept is None:
            self.paths.fell_back(
                "forward passes", "whole", "the pass draws random numbers or writes into tensors"
            )
        else:
            self.paths.took("forward passes", "resumed from the first change")
        return kept

    def _resumed(self, prefix: CachedPrefix, models: Stack, probe: Any) -> Array | None:
        try:
            with prefix.resumed(self.recipe.model, models.stacked):
                return self._vmapped(models, probe)
        except Exception as error:  # noqa: BLE001 (whole passes are then taken, which raise what recurs)
            self.paths.fell_back("forward passes", "whole", reason(error))
            return None

    def _evaluate(self, model: Any, batch: Any) -> Tensor:
        return measures.evaluate(self.by_name, model, batch)
