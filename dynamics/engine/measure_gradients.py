"""Gradients of a measure with respect to the parameters, at one model or at several at once by vmap."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.engine.stack_memory import QUARTER, chunks, models_per_stack
from dynamics.measures import LogitMeasure, Measure
from dynamics.models.functional import call_with, eval_mode
from dynamics.recipe import Recipe
from dynamics.steps import NonFiniteGradient
from dynamics.steps.fallbacks import ComputePaths, Fallback, out_of_memory, reason
from dynamics.steps.per_example import signature, stacked_batches
from dynamics.steps.pullbacks import alike
from dynamics.steps.worker_threads import spread
from dynamics.trees import Gradients, copied, not_finite

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

    Of a measure of the logits those of several models are taken at once, by vmap; the first time one of them is
    taken both ways, and where vmap cannot take the model or finds something else, all are taken one by one. So are
    those of the user's functions, which may keep or change what they see.

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

        def alone(i: int) -> dict[str, Tensor | None]:
            return self._alone(query, {n: leaf[i] for n, leaf in leaves.items()}, weights[i])[1]

        if len(weights) == 1:
            return {n: g for n, g in alone(0).items() if g is not None}
        name = query.name
        if not isinstance(query.measure, LogitMeasure):
            self.paths.took(PART, f"{ONE_BY_ONE}: a function of (model, batch) may keep what it sees")
        elif self._vmap_holds.get(name, True):
            try:
                together = self._together(query, leaves, weights)
                if name not in self._vmap_holds:
                    first = {n: None if g is None else g[0] for n, g in together.items()}
                    if not alike(first, alone(0)):
                        raise Fallback("vmap found another gradient than a backward pass of one model")
                    self._vmap_holds[name] = True
                self.paths.took(PART, "vmap over the nodes of a path")
                return {n: g.sum(0, dtype=torch.float64) for n, g in together.items() if g is not None}
            except Fallback as error:
                self._vmap_holds.setdefault(name, False)
                self.paths.fell_back(PART, ONE_BY_ONE, str(error))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self.paths.fell_back(PART, "fewer models at a time", reason(error))
                return self._in_halves(query, leaves, weights)
        total: dict[str, Tensor] = {}
        for i in range(len(weights)):
            for n, g in alone(i).items():
                if g is not None:
                    total[n] = total[n].add_(g) if n in total else g.double()
        return total

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
            value, alone = self._of_alike(queries, leaves)[0]
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
                for i, (value, found) in zip(
                    chunk, self._of_alike([queries[i] for i in chunk], leaves), strict=True
                ):
                    values[i] = value
                    for n, g in found.items():
                        if g is not None:
                            gradients[n][i] = g.to_dense() if g.is_sparse else g
        return values, gradients

    def _of_alike(
        self, queries: Sequence[MeasureQuery], leaves: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Mapping[str, Tensor | None]]]:
        """Measure and gradient on each of several probes of one shape."""
        name = f"{queries[0].name} over probes"
        alone: list[tuple[Tensor, Mapping[str, Tensor | None]]] = []
        if not isinstance(queries[0].measure, LogitMeasure):
            self.paths.took(PART, f"{ONE_BY_ONE}: a function of (model, batch) may keep what it sees")
        elif len(queries) > 2 and self._vmap_holds.get(name, True):
            try:
                values, together = self._over_probes(queries, leaves)
                if name not in self._vmap_holds:
                    alone = [self._alone(queries[0], leaves, 1.0)]
                    read = {
                        n: torch.zeros_like(leaves[n]) if g is None else g for n, g in alone[0][1].items()
                    }
                    if not alike({n: g[0] for n, g in together.items()}, read):
                        raise Fallback("vmap found another gradient than a backward pass of one probe")
                    self._vmap_holds[name] = True
                self.paths.took(PART, "vmap over probes")
                return [(v, {n: g[i] for n, g in together.items()}) for i, v in enumerate(values)]
            except Fallback as error:
                self._vmap_holds.setdefault(name, False)
                self.paths.fell_back(PART, ONE_BY_ONE, str(error))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self.paths.fell_back(PART, "fewer models at a time", reason(error))
                middle = len(queries) // 2
                return self._of_alike(queries[:middle], leaves) + self._of_alike(queries[middle:], leaves)
        return alone + [self._alone(query, leaves, 1.0) for query in queries[len(alone) :]]

    def _over_probes(
        self, queries: Sequence[MeasureQuery], leaves: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Measure [n_probes] and gradients [n_probes, *shape], by vmap.

        Raises:
            Fallback: vmap cannot take it, or a gradient is not finite.
        """
        tensors, probe_of = stacked_batches([query.probe for query in queries])
        shared = copied(queries[0].others, self.checkpoint.buffers)  # a forward pass may write into them
        detached = {n: leaf.detach() for n, leaf in leaves.items()}

        def of_one(own: dict[str, Tensor], probe: dict[int, Tensor]) -> Tensor:
            return replace(queries[0], probe=probe_of(probe)).value(self.recipe.model, {**shared, **own})

        try:
            with (
                warnings.catch_warnings(),
                self.checkpoint.random_state(),
                eval_mode(self.recipe.model),
            ):
                warnings.simplefilter("error")
                of_each = torch.func.grad_and_value(of_one)
                found, values = torch.vmap(of_each, in_dims=(None, 0), randomness="same")(detached, tensors)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise Fallback(reason(error)) from error  # an error of the user's own comes back one by one
        if culprit := not_finite(found):
            raise Fallback(f"vmap found the gradient of {culprit} not finite")
        return values, found

    def _in_halves(
        self, query: MeasureQuery, leaves: Mapping[str, Tensor], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        middle = len(weights) // 2
        total: dict[str, Tensor] = {}
        for half in (slice(middle), slice(middle, None)):
            for n, g in self.summed(
                query, {n: leaf[half] for n, leaf in leaves.items()}, weights[half]
            ).items():
                total[n] = total[n] + g if n in total else g.double()
        return total

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
    ) -> dict[str, Tensor | None]:
        """Every model's gradient times its weight, [k, *shape].

        Raises:
            Fallback: vmap cannot take it, or a gradient is not finite.
        """
        inputs = {n: leaf.detach().requires_grad_() for n, leaf in leaves.items()}
        shared = copied(query.others, self.checkpoint.buffers)  # a forward pass may write into them

        def of_one(own: dict[str, Tensor]) -> Tensor:
            return query.value(self.recipe.model, {**shared, **own})

        try:
            with (
                warnings.catch_warnings(),
                self.checkpoint.random_state(),
                torch.enable_grad(),
                eval_mode(self.recipe.model),
            ):
                warnings.simplefilter("error")
                values = torch.vmap(of_one, randomness="same")(inputs)
                grads = torch.autograd.grad(
                    values, list(inputs.values()), values.new_tensor(weights), allow_unused=True
                )
        except Exception as error:
            if out_of_memory(error):
                raise
            raise Fallback(reason(error)) from error  # an error of the user's own comes back one by one
        found: dict[str, Tensor | None] = dict(zip(inputs, grads, strict=True))
        if culprit := not_finite(found):
            raise Fallback(f"vmap found the gradient of {culprit} not finite")
        return found
