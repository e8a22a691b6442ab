"""Gradients of a measure with respect to the parameters, at one model or at several at once by vmap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.engine.side_effects import nothing_written
from dynamics.engine.stack_memory import QUARTER, chunks, models_per_stack
from dynamics.measures import LogitMeasure, Measure
from dynamics.models.functional import call_with, eval_mode, unfused_attention
from dynamics.recipe import Recipe
from dynamics.steps import NonFiniteGradient
from dynamics.steps.fallbacks import ComputePaths, Fallback, in_halves, out_of_memory, reason
from dynamics.steps.per_example import signature, stacked_batches
from dynamics.steps.pullbacks import alike
from dynamics.steps.worker_threads import spread
from dynamics.trees import Gradients, copied, not_finite

A = TypeVar("A")
T = TypeVar("T")

PART = "gradients of the measure"
ONE_BY_ONE = "one model at a time"


@dataclass(frozen=True)
class MeasureQuery:
    """A measure to be differentiated, and on what.

    Attributes:
        name, measure: of the measure.
        probe: what it is evaluated on.
        others: tensors beside the trained parameters, shared by all models.
        where: how errors name this.
    """

    name: str
    measure: Measure
    probe: object
    others: Mapping[str, Tensor]
    where: str

    def value(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """The measure of a model with other tensors in place of its own: a scalar."""
        return call_with(
            lambda m, b: measures.evaluate({self.name: self.measure}, m, b)[0], model, tensors, self.probe
        )


@dataclass
class MeasureGradients:
    """Gradients of measures with respect to the trained parameters, at models that differ in these alone.

    Those of several models, or on several probes, are taken at once, by vmap; the first time one is taken by itself
    too, and where vmap cannot take the model, finds something else, or a function of the user's writes into what it
    sees or closes over, all are taken one by one. Where memory runs out they are taken in halves.

    Attributes:
        recipe: its model gives the code and says which parameters are trained.
        checkpoint: whose random numbers a measure draws.
        paths: where it is noted which way gradients were taken.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    paths: ComputePaths = field(default_factory=ComputePaths)
    _vmap_holds: dict[str, bool] = field(default_factory=dict, init=False)

    def summed(
        self, query: MeasureQuery, leaves: Mapping[str, Tensor], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """Σ_k w_k ∇M(θ_k) by trained parameter, in fp64, of one model in the parameters' dtype; parameters the
        measure does not depend on are left out.

        Args:
            query: M.
            leaves: θ, the trained parameters of all models, [k, *shape].
            weights: w, length k.

        Raises:
            ValueError: the measure cannot be differentiated.
            NonFiniteGradient: a gradient is NaN or infinite; names the parameter.
        """

        def alone(i: int) -> dict[str, Tensor]:
            found = self._alone(query, {n: leaf[i] for n, leaf in leaves.items()}, weights[i])[1]
            return {n: g for n, g in found.items() if g is not None}

        if len(weights) == 1:
            return alone(0)

        def first_alike(several: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> bool:
            return alike({n: g[0] for n, g in several.items()}, first)

        def sums(numbers: Sequence[int]) -> list[dict[str, Tensor]]:
            """The sum over some neighbours."""
            part = slice(numbers[0], numbers[-1] + 1)
            some = {n: leaf[part] for n, leaf in leaves.items()}
            first, found = self._at_once(
                query.name,
                "vmap over the nodes of a path",
                partial(alone, numbers[0]),
                lambda: self._together(query, some, weights[part]),
                first_alike,
            )
            if found is not None:
                return [{n: g.sum(0, dtype=torch.float64) for n, g in found.items()}]
            return [_total(chain(first, map(alone, numbers[len(first) :])))]

        return _total(in_halves(sums, range(len(weights)), self.paths, PART))

    def _at_once(
        self,
        key: str,
        path: str,
        alone: Callable[[], A],
        together: Callable[[], T],
        agree: Callable[[Any, Any], bool],
    ) -> tuple[list[A], T | None]:
        """What vmap gives for several, or None where they have to be taken one by one; the first time beside the
        first of them by itself, in a list that is empty later.

        Args:
            key: of what is remembered whether vmap holds.
            path: as provenance names it.
            alone: the first by itself.
            together: all of them.
            agree: whether the first of these is what it is by itself.
        """
        if not self._vmap_holds.get(key, True):
            return [], None
        first = [] if key in self._vmap_holds else [alone()]
        try:
            found = together()
            if first and not agree(found, first[0]):
                raise Fallback("vmap found another gradient than a backward pass by itself")
        except Fallback as error:
            self._vmap_holds.setdefault(key, False)
            self.paths.fell_back(PART, ONE_BY_ONE, str(error))
            return first, None
        self._vmap_holds[key] = True
        self.paths.took(PART, path)
        return first, found

    def add_to(
        self,
        total: Mapping[str, Tensor],
        query: MeasureQuery,
        leaves: Mapping[str, Tensor],
        weights: Sequence[float],
    ) -> None:
        """Add Σ_k w_k ∇M(θ_k) to a total, as `summed`.

        Of one model each tensor's gradient is added as soon as it is there, so that never all of them are held.

        Args:
            total: by trained parameter; written.
            query, leaves, weights: as `summed`.
        """
        if len(weights) > 1 or any(total[n].dtype != leaf.dtype for n, leaf in leaves.items()):
            found = self.summed(query, leaves, weights)
            spread(lambda name: total[name].add_(found[name]), list(found))
            return
        inputs = {n: leaf[0].detach().requires_grad_() for n, leaf in leaves.items()}
        value = self._value(query, inputs)
        for n, leaf in inputs.items():
            leaf.grad = total[n]
        torch.autograd.backward(value, value.new_tensor(weights[0]), inputs=list(inputs.values()))
        self._check_finite(query, total)

    def of_probes(
        self, queries: Sequence[MeasureQuery], leaves: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A measure on several probes, [n_probes] in fp64, and ∇M of each by trained parameter, [n_probes, *shape].

        Three probes or more of one shape are taken at once, by vmap, where that holds as in `summed`. A parameter
        that the measure does not depend on has gradient zero.

        Args:
            queries: of one measure and one model, a probe each.
            leaves: θ, the trained parameters, [*shape].

        Raises: as `summed`.
        """
        if len(queries) == 1:
            value, alone = self._of_alike(leaves, queries)[0]
            read = {n: torch.zeros_like(leaf) if (g := alone[n]) is None else g for n, leaf in leaves.items()}
            return value.double()[None], {
                n: (g.to_dense() if g.is_sparse else g)[None] for n, g in read.items()
            }
        gradients = {n: leaf.new_zeros(len(queries), *leaf.shape) for n, leaf in leaves.items()}
        values = next(iter(leaves.values())).new_zeros(len(queries), dtype=torch.float64)
        by_shape: dict[Any, list[int]] = {}
        for i, query in enumerate(queries):
            by_shape.setdefault(signature(query.probe), []).append(i)
        for numbers in by_shape.values():
            for chunk in chunks(numbers, models_per_stack(leaves.values(), QUARTER)):
                taken = in_halves(
                    partial(self._of_alike, leaves), [queries[i] for i in chunk], self.paths, PART
                )
                for i, (value, found) in zip(chunk, taken, strict=True):
                    values[i] = value
                    for n, g in found.items():
                        if g is not None:
                            gradients[n][i] = g.to_dense() if g.is_sparse else g
        return values, gradients

    def _of_alike(
        self, leaves: Mapping[str, Tensor], queries: Sequence[MeasureQuery]
    ) -> list[tuple[Tensor, Mapping[str, Tensor | None]]]:
        """Measure and gradient on each of several probes of one shape."""

        def first_alike(
            several: tuple[Tensor, dict[str, Tensor]], first: tuple[Tensor, dict[str, Tensor | None]]
        ) -> bool:
            read = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in first[1].items()}
            return alike({n: g[0] for n, g in several[1].items()}, read)

        first: list[tuple[Tensor, dict[str, Tensor | None]]] = []
        if len(queries) > 2:
            first, found = self._at_once(
                f"{queries[0].name} over probes",
                "vmap over probes",
                partial(self._alone, queries[0], leaves, 1.0),
                lambda: self._over_probes(queries, leaves),
                first_alike,
            )
            if found is not None:
                values, together = found
                return [(v, {n: g[i] for n, g in together.items()}) for i, v in enumerate(values)]
        return [*first, *(self._alone(query, leaves, 1.0) for query in queries[len(first) :])]

    def _over_probes(
        self, queries: Sequence[MeasureQuery], leaves: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Measure [n_probes] and gradients [n_probes, *shape], by vmap.

        Raises:
            Fallback: vmap cannot take it, a gradient is not finite, or the measure writes into something.
        """
        tensors, probe_of = stacked_batches([query.probe for query in queries])

        def of_one(shared: Mapping[str, Tensor], own: dict[str, Tensor], probe: dict[int, Tensor]) -> Tensor:
            return replace(queries[0], probe=probe_of(probe)).value(self.recipe.model, {**shared, **own})

        with self._vmapping(queries, leaves) as (shared, own):
            of_each = torch.func.grad_and_value(partial(of_one, shared))
            found, values = torch.vmap(of_each, in_dims=(None, 0), randomness="same")(own, tensors)
        _refuse_not_finite(found)
        return values, found

    @contextmanager
    def _vmapping(
        self, queries: Sequence[MeasureQuery], leaves: Mapping[str, Tensor]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Inside, a measure is called for several models or probes at once.

        Args:
            queries: of one measure and the same other tensors.
            leaves: the trained parameters.

        Yields:
            The other tensors and the trained parameters.

        Raises:
            Fallback: for any error but one of memory, and where the measure writes into something; an error of the
                user's own comes back one by one.
        """
        model, first, users = self.recipe.model, queries[0], not isinstance(queries[0].measure, LogitMeasure)
        # a forward pass may write into buffers, a function into anything
        shared = copied(first.others, first.others if users else self.checkpoint.buffers)
        own = copied({n: leaf.detach() for n, leaf in leaves.items()}, leaves if users else ())
        try:
            with ExitStack() as inside:
                inside.enter_context(warnings.catch_warnings())
                warnings.simplefilter("error")
                inside.enter_context(self.checkpoint.random_state())
                inside.enter_context(eval_mode(model))
                inside.enter_context(unfused_attention())
                if users:
                    probes = [query.probe for query in queries]
                    inside.enter_context(nothing_written(model, [first.measure], probes, own.values()))
                yield shared, own
        except Exception as error:
            if isinstance(error, Fallback) or out_of_memory(error):
                raise
            raise Fallback(reason(error)) from error

    def _alone(
        self, query: MeasureQuery, leaves: Mapping[str, Tensor], weight: float
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """One model's measure, and the gradient times its weight."""
        inputs = {n: leaf.detach().requires_grad_() for n, leaf in leaves.items()}
        value = self._value(query, inputs)
        grads = torch.autograd.grad(value, list(inputs.values()), value.new_tensor(weight), allow_unused=True)
        found: dict[str, Tensor | None] = dict(zip(inputs, grads, strict=True))
        self._check_finite(query, found)
        return value.detach(), found

    def _value(self, query: MeasureQuery, inputs: Mapping[str, Tensor]) -> Tensor:
        """One model's measure, with its graph from the inputs.

        Raises:
            ValueError: it has none.
        """
        tensors = {**query.others, **inputs}
        own = self.checkpoint.buffers if isinstance(query.measure, LogitMeasure) else tensors
        with self.checkpoint.random_state(), torch.enable_grad(), eval_mode(self.recipe.model):
            value = query.value(self.recipe.model, copied(tensors, own))
        if not value.requires_grad:
            raise ValueError(
                f"measure {query.name!r} has no gradient with respect to any trained parameter, so nothing can be "
                "attributed. Give one that can be differentiated, such as a logit; patch_updates takes any."
            )
        return value

    def _check_finite(self, query: MeasureQuery, found: Gradients) -> None:
        if culprit := not_finite(found):
            raise NonFiniteGradient(
                f"The gradient of measure {query.name!r} of {query.where} at {culprit} is not finite."
            )

    def _together(
        self, query: MeasureQuery, leaves: Mapping[str, Tensor], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """Every model's gradient times its weight, [k, *shape], of the parameters that the measure depends on.

        Raises:
            Fallback: vmap cannot take it, a gradient is not finite, or the measure writes into something.
        """
        with self._vmapping([query], leaves) as (shared, own), torch.enable_grad():
            inputs = {n: leaf.requires_grad_() for n, leaf in own.items()}
            values = torch.vmap(
                lambda own: query.value(self.recipe.model, {**shared, **own}), randomness="same"
            )(inputs)
            grads = torch.autograd.grad(
                values, list(inputs.values()), values.new_tensor(weights), allow_unused=True
            )
        found = {n: g for n, g in zip(inputs, grads, strict=True) if g is not None}
        _refuse_not_finite(found)
        return found


def _refuse_not_finite(found: Gradients) -> None:
    """Raise a Fallback where vmap found a gradient that is not finite: one by one it is an error with its name."""
    if culprit := not_finite(found):
        raise Fallback(f"vmap found the gradient of {culprit} not finite")


def _total(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of gradients in fp64, of each parameter that one of them has."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for n, g in part.items():
            total[n] = total[n] + g if n in total else g.double()
    return total
