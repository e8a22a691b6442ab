"""An optimizer's update divided among the sources of its gradients: one first moment for each source.

    AdamW:  Δ = −η / (1 − β1^t) · Σ_j m^(j) / (√v̂ + ε) − ηλθ        m^(j) ← β1 m^(j) + (1 − β1) c g^(j)
    SGD:    Δ = −η Σ_j b^(j)                                          b^(j) ← μ b^(j) + (1 − dampening) c g^(j)

The first moment is linear in the gradients, so it is the sum of one moment for each source. The second moment v and
the clip's coefficient c are the whole batch's: what a source does to those is shared by all and attributed to none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from dynamics.recipe import ByValue, Clip, RecipeError
from dynamics.steps.elementwise_optimizers import is_decoupled
from dynamics.trees import Gradients, squared_norm

BEFORE = "before"
"""The source of momentum from before the stretch."""

DECAY = "decay"
"""The source of weight decay."""


@dataclass(frozen=True)
class DividedUpdate:
    """One parameter's update, Δ = factor · Σ_j directions[j] + decay.

    Attributes:
        directions: [n_sources, *shape].
        factor: what each is multiplied by, element by element: [*shape] or [].
        decay: the update of a decay that does not pass through the moments, [*shape]; None where there is none.
    """

    directions: Tensor
    factor: Tensor
    decay: Tensor | None

    @property
    def total(self) -> Tensor:
        """The whole update, [*shape]."""
        summed = self.directions.sum(0) * self.factor
        return summed if self.decay is None else summed + self.decay


class UpdatesBySource:
    """The update of each step of a training loop, divided among the sources of its gradients.

    Args:
        optimizer: the loop's, before the first step; AdamW, Adam or SGD.
        names: parameter names by id.
        clip: of the recipe.

    Attributes:
        labels: the sources that have moments, in the order they were met; `before` and `decay` where they do.

    Raises:
        RecipeError: the update is not linear in the gradients given its denominators; says why.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], clip: Clip) -> None:
        if why := _not_linear(optimizer, clip):
            raise RecipeError(
                f"the update cannot be divided among sources: {why}. Leave out sources=; steps and sites are "
                "attributed for any optimizer."
            )
        self._optimizer, self._names = optimizer, names
        self.labels: list[str] = []
        self._moments: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._begun: set[str] = set()
        self._moved: set[str] = set()
        recorded = {
            n: optimizer.state.get(p, {}).get(_first_moment(optimizer)) for n, p, _ in self._parameters()
        }
        if any(moment is not None for moment in recorded.values()):
            self.labels.append(BEFORE)
        for name, p, _ in self._parameters():
            self._moments[name] = p.detach().new_zeros(len(self.labels), *p.shape)
            if (moment := recorded[name]) is not None:
                self._moments[name][0] = moment
                self._begun.add(name)

    def begin(self) -> None:
        """Before the optimizer's step, when the batch's gradient is there: what was learnt before decays."""
        self._moved = {name for name, p, _ in self._parameters() if p.grad is not None}
        for name, p, group in self._moving():
            moments, kept = self._moments[name], self._weights(name, group)[0]
            moments.mul_(kept)
            if group.get("nesterov"):
                self._own[name] = torch.zeros_like(moments)
            if (decay := group["weight_decay"]) and not is_decoupled(type(self._optimizer), group):
                self._add(name, DECAY, p.detach(), decay, group)

    def add(self, label: str, gradients: Gradients, scale: float) -> None:
        """Between `begin` and the optimizer's step: a source's part of the batch's gradient.

        Args:
            label: of the source.
            gradients: by parameter, before clipping; None where it has none.
            scale: what clipping multiplies the batch's gradient by.
        """
        for name, _, group in self._moving():
            if (g := gradients[name]) is not None:
                signed = -scale if group["maximize"] else scale
                self._add(name, label, g.detach(), signed, group)

    def missed(self) -> tuple[float, float]:
        """Between the last `add` and the optimizer's step: how far the sources' moments are from those that the
        optimizer will make of the batch's own gradient, and the sum of their lengths."""
        gaps, lengths, moment_of = 0.0, [0.0] * len(self.labels), _first_moment(self._optimizer)
        for name, p, group in self._moving():
            assert p.grad is not None
            kept, joined = self._weights(name, group)
            gap = p.grad.to_dense() * (-joined if group["maximize"] else joined)
            if (decay := group["weight_decay"]) and not is_decoupled(type(self._optimizer), group):
                gap.add_(p.detach(), alpha=decay * joined)
            if kept and (moment := self._optimizer.state.get(p, {}).get(moment_of)) is not None:
                gap.add_(moment, alpha=kept)
            for j, of_source in enumerate(self._moments[name]):
                gap.sub_(of_source)
                lengths[j] += squared_norm(of_source)
            gaps += squared_norm(gap)
        return math.sqrt(gaps), sum(map(math.sqrt, lengths))

    def divided(self, before: Mapping[str, Tensor]) -> Iterator[tuple[str, DividedUpdate]]:
        """After the optimizer's step: its update of each parameter that moved.

        Args:
            before: parameters before the step.
        """
        kind = type(self._optimizer)
        for name, p, group in self._moving():
            self._begun.add(name)
            lr, decay, directions = (
                float(group["lr"]),
                group["weight_decay"],
                self._grown(self._moments, name),
            )
            if group.get("nesterov"):
                directions = self._grown(self._own, name) + group["momentum"] * directions
            factor = p.new_tensor(-lr) if kind is SGD else _factor(group, self._optimizer.state[p])
            decoupled = decay and is_decoupled(kind, group)
            yield name, DividedUpdate(directions, factor, before[name] * (-lr * decay) if decoupled else None)

    def _add(self, name: str, label: str, g: Tensor, scale: float, group: Mapping[str, Any]) -> None:
        """A gradient of one source joins its moments."""
        if label not in self.labels:
            self.labels.append(label)
        place = self.labels.index(label)
        moments = self._grown(self._moments, name)
        moments[place].add_(g, alpha=self._weights(name, group)[1] * scale)
        if group.get("nesterov"):
            self._grown(self._own, name)[place].add_(g, alpha=scale)

    def _weights(self, name: str, group: Mapping[str, Any]) -> tuple[float, float]:
        """How much of a first moment is kept in a step, and how much of the gradient joins it."""
        if "betas" in group:
            return group["betas"][0], 1 - group["betas"][0]
        if not group["momentum"]:
            return 0.0, 1.0
        return group["momentum"], 1 - group["dampening"] if name in self._begun else 1.0

    def _moving(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        return (found for found in self._parameters() if found[0] in self._moved)

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                yield self._names[id(p)], p, group

    def _grown(self, by_name: dict[str, Tensor], name: str) -> Tensor:
        """A parameter's tensors by source, with a row for every source met so far."""
        found = by_name[name]
        if missing := len(self.labels) - len(found):
            by_name[name] = found = torch.cat([found, found.new_zeros(missing, *found.shape[1:])])
        return found


def _first_moment(optimizer: Optimizer) -> str:
    return "momentum_buffer" if type(optimizer) is SGD else "exp_avg"


def _not_linear(optimizer: Optimizer, clip: Clip) -> str | None:
    """Why an optimizer's update is no sum over the sources of its gradients; None where it is."""
    kind = type(optimizer)
    if kind not in (Adam, AdamW, SGD):
        return f"{kind.__name__} is not AdamW, Adam or SGD"
    if isinstance(clip, ByValue):
        return "clipping by value is not linear in the gradient"
    for group in optimizer.param_groups:
        if odd := [key for key in ("amsgrad", "capturable", "differentiable") if group.get(key)]:
            return f"{kind.__name__} has {odd[0]}=True"
    return None


def _factor(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """−η / (1 − β1^t) / (√v̂ + ε) of Adam and AdamW, from the state after the step."""
    (beta1, beta2), t = group["betas"], float(state["step"])
    root: Tensor = (state["exp_avg_sq"].sqrt() / (1 - beta2**t) ** 0.5).add_(group["eps"])
    return root.reciprocal_().mul_(-float(group["lr"]) / (1 - beta1**t))
