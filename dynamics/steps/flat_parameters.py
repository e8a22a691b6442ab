"""Parameters side by side in one flat vector, so that small ones of one group take a step in one go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dynamics.steps.elementwise_optimizers import Moved, rule

SMALL = 65536
"""Elements of a vector in which parameters are put together; larger ones stand alone."""


@dataclass(frozen=True)
class FlatParameters:
    """Some parameters of one group, or one of them, as a part of a flat vector that moves by one rule.

    Attributes:
        parts: their elements, by name, flat views of θ.
        shapes: as many.
        moved: how the vector moves.
        begin: where in the vector they begin.
        theta: θ of all of them, flat.
    """

    parts: Mapping[str, Tensor]
    shapes: Sequence[torch.Size]
    moved: Moved
    begin: int
    theta: Tensor

    def apart(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Vectors [n, size] as views in the parameters' shapes, by name: [n, *shape]."""
        begin = 0
        for (name, part), shape in zip(self.parts.items(), self.shapes, strict=True):
            yield name, flat[:, begin : begin + len(part)].view(len(flat), *shape)
            begin += len(part)

    @cached_property
    def one_by_one(self) -> list[FlatParameters]:
        """Each parameter by itself, in the same vector."""
        found, begin = [], self.begin
        for (name, part), shape in zip(self.parts.items(), self.shapes, strict=True):
            found.append(FlatParameters({name: part}, [shape], self.moved, begin, part))
            begin += len(part)
        return found


def flat_parameters(
    kind: type[Optimizer],
    group: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Tensor],
) -> Iterator[FlatParameters]:
    """A group's parameters in their order, neighbours together that are small and of one kind.

    Args:
        kind, group: of the optimizer, as `rule`.
        states: what is recorded of each, as tensors of its shape and the number of steps.
        parameters: θ by name.
    """
    waiting: list[str] = []
    for name, theta in parameters.items():
        size = sum(parameters[n].numel() for n in waiting) + theta.numel()
        kinds = [_kind(parameters[n], states.get(n, {})) for n in (*waiting[-1:], name)]
        if waiting and (size > SMALL or kinds[0] != kinds[1]):
            yield _together(kind, group, states, {n: parameters[n] for n in waiting})
            waiting = []
        waiting.append(name)
    if waiting:
        yield _together(kind, group, states, {n: parameters[n] for n in waiting})


def _kind(theta: Tensor, state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What parameters must share to stand in one vector."""
    return theta.dtype, theta.device, float(state.get("step", 0)), _moments(state)


def _moments(state: Mapping[str, Any]) -> list[str]:
    return sorted(key for key, value in state.items() if isinstance(value, Tensor) and key != "step")


def _together(
    kind: type[Optimizer],
    group: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Tensor],
) -> FlatParameters:
    of_each = [states.get(name, {}) for name in parameters]
    thetas = [theta.detach().reshape(-1) for theta in parameters.values()]
    state = {key: _joined([own[key].reshape(-1) for own in of_each]) for key in _moments(of_each[0])}
    theta = _joined(thetas)
    moved = rule(kind, group, {**of_each[0], **state}, theta)
    parts = dict(zip(parameters, torch.split(theta, [len(t) for t in thetas]), strict=True))
    return FlatParameters(parts, [p.shape for p in parameters.values()], moved, 0, theta)


def _joined(flat: Sequence[Tensor]) -> Tensor:
    """One vector of several; of one, itself."""
    return flat[0] if len(flat) == 1 else torch.cat(list(flat))
