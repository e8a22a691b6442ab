"""Gradients of measures, at one model or at several at once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.measures import LogitMeasure, Measure
from dynamics.models.functional import call, evaluating
from dynamics.recipe import Recipe
from dynamics.steps import NonFiniteGradient
from dynamics.steps.pullbacks import alike
from dynamics.trees import copied, not_finite


@dataclass(frozen=True)
class Asked:
    """What is differentiated.

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
        return call(
            lambda m, b: measures.evaluate({self.name: self.measure}, m, b)[0], model, tensors, self.probe
        )


@dataclass
class Slopes:
    """Gradients of measures with respect to the trained parameters, at models that differ in these alone.

    Of a measure of the logits those of several models are taken at once, by vmap; the first time one of them is
    taken both ways, and where vmap cannot take the model or finds something else, all are taken one by one. So are
    those of the user's functions, which may keep or change what they see.

    Attributes:
        recipe: its model gives the code and says which parameters are trained.
        checkpoint: whose random numbers a measure draws.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    _at_once: dict[str, bool] = field(default_factory=dict, init=False)

    def summed(
        self, asked: Asked, leaves: Mapping[str, Tensor], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """Σ_k w_k ∇M(θ_k) by trained parameter, in fp64, of one model in the parameters' dtype; parameters the
        measure does not depend on are left out.

        Args:
            asked: M.
            leaves: θ, the trained parameters of all models, [k, *shape].
            weights: w, length k.

        Raises:
            ValueError: the measure cannot be differentiated.
            NonFiniteGradient: a gradient is NaN or infinite; names the parameter.
        """

        def alone(i: int) -> dict[str, Tensor | None]:
            return self._alone(asked, {n: leaf[i] for n, leaf in leaves.items()}, weights[i])

        name = asked.name
        if len(weights) > 1 and isinstance(asked.measure, LogitMeasure) and self._at_once.get(name, True):
            together = self._together(asked, leaves, weights)
            if name not in self._at_once:
                first = {n: None if g is None else g[0] for n, g in together.items()}
                self._at_once[name] = bool(together) and alike(first, alone(0))
            if together and self._at_once[name]:
                return {n: g.sum(0, dtype=torch.float64) for n, g in together.items() if g is not None}
        if len(weights) == 1:
            return {n: g for n, g in alone(0).items() if g is not None}
        total: dict[str, Tensor] = {}
        for i in range(len(weights)):
            for n, g in alone(i).items():
                if g is not None:
                    total[n] = total[n].add_(g) if n in total else g.double()
        return total

    def _alone(self, asked: Asked, leaves: Mapping[str, Tensor], weight: float) -> dict[str, Tensor | None]:
        """One model's gradient times its weight."""
        inputs = {n: leaf.detach().requires_grad_() for n, leaf in leaves.items()}
        tensors = {**asked.others, **inputs}
        own = self.checkpoint.buffers if isinstance(asked.measure, LogitMeasure) else tensors
        with self.checkpoint.random_state(), torch.enable_grad(), evaluating(self.recipe.model):
            value = asked.value(self.recipe.model, copied(tensors, own))
        if not value.requires_grad:
            raise ValueError(
                f"measure {asked.name!r} has no gradient with respect to any trained parameter, so nothing can be "
                "attributed. Give one that can be differentiated, such as a logit; patch_updates takes any."
            )
        grads = torch.autograd.grad(value, list(inputs.values()), value.new_tensor(weight), allow_unused=True)
        found: dict[str, Tensor | None] = dict(zip(inputs, grads, strict=True))
        if culprit := not_finite(found):
            raise NonFiniteGradient(
                f"The gradient of measure {asked.name!r} of {asked.where} at {culprit} is not finite."
            )
        return found

    def _together(
        self, asked: Asked, leaves: Mapping[str, Tensor], weights: Sequence[float]
    ) -> dict[str, Tensor | None]:
        """Every model's gradient times its weight, [k, *shape]; nothing where vmap cannot take it."""
        inputs = {n: leaf.detach().requires_grad_() for n, leaf in leaves.items()}
        shared = copied(asked.others, self.checkpoint.buffers)  # a forward pass may write into them

        def of_one(own: dict[str, Tensor]) -> Tensor:
            return asked.value(self.recipe.model, {**shared, **own})

        try:
            with (
                warnings.catch_warnings(),
                self.checkpoint.random_state(),
                torch.enable_grad(),
                evaluating(self.recipe.model),
            ):
                warnings.simplefilter("error")
                values = torch.vmap(of_one, randomness="same")(inputs)
                grads = torch.autograd.grad(
                    values, list(inputs.values()), values.new_tensor(weights), allow_unused=True
                )
        except Exception:  # noqa: BLE001 (one by one it is said what is wrong, if anything is)
            return {}
        found: dict[str, Tensor | None] = dict(zip(inputs, grads, strict=True))
        return {} if not_finite(found) else found
