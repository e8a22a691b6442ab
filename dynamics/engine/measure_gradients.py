"""Gradients of a measure with respect to the parameters, at one model or at several at once by vmap."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.measures import LogitMeasure, Measure
from dynamics.models.functional import call_with, eval_mode
from dynamics.recipe import Recipe
from dynamics.steps import NonFiniteGradient
from dynamics.steps.fallbacks import ComputePaths, Fallback, out_of_memory, reason
from dynamics.steps.pullbacks import alike
from dynamics.trees import copied, not_finite

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
            return self._alone(query, {n: leaf[i] for n, leaf in leaves.items()}, weights[i])

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
    ) -> dict[str, Tensor | None]:
        """One model's gradient times its weight."""
        inputs = {n: leaf.detach().requires_grad_() for n, leaf in leaves.items()}
        tensors = {**query.others, **inputs}
        own = self.checkpoint.buffers if isinstance(query.measure, LogitMeasure) else tensors
        with self.checkpoint.random_state(), torch.enable_grad(), eval_mode(self.recipe.model):
            value = query.value(self.recipe.model, copied(tensors, own))
        if not value.requires_grad:
            raise ValueError(
                f"measure {query.name!r} has no gradient with respect to any trained parameter, so nothing can be "
                "attributed. Give one that can be differentiated, such as a logit; patch_updates takes any."
            )
        grads = torch.autograd.grad(value, list(inputs.values()), value.new_tensor(weight), allow_unused=True)
        found: dict[str, Tensor | None] = dict(zip(inputs, grads, strict=True))
        if culprit := not_finite(found):
            raise NonFiniteGradient(
                f"The gradient of measure {query.name!r} of {query.where} at {culprit} is not finite."
            )
        return found

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
