"""Path integral of a measure's gradient along the straight line from one model to another: integrated gradients.

Only the measure is ever differentiated; where the path leads is the optimizer's own step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dynamics.engine.measure_gradients import MeasureGradients, MeasureQuery
from dynamics.engine.stack_memory import QUARTER, chunks, models_per_stack
from dynamics.measures import Measure
from dynamics.steps.stacks import Workspace
from dynamics.steps.worker_threads import blocks, spread

Method = Literal["first_order", "integrated"]

FEWEST_NODES = 8
"""Nodes that integration begins with: fewer let a residual be small by accident where gradients jump."""


@dataclass(frozen=True)
class Quadrature:
    """The nodes of an integration path at which the gradient is taken, and when they suffice.

    Attributes:
        method: "first_order", one gradient where the path begins; or "integrated", Gauss-Legendre nodes.
        tolerance: |ΣA − change of the measure| / Σ|A| over the parameter tensors, at which nodes suffice.
        max_nodes: the most that are tried.

    Source: the integral is that of integrated gradients (Sundararajan et al. 2017).
    """

    method: Method
    tolerance: float
    max_nodes: int

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(get_args(Method))}.")
        if not (self.tolerance >= 0 and self.max_nodes >= 1):
            raise ValueError(
                f"found tolerance {self.tolerance} and max_nodes {self.max_nodes}; expected a tolerance of "
                "0 or more and 1 node or more."
            )

    def rules(self) -> Iterator[list[tuple[float, float]]]:
        """Quadrature rules to try in turn, each a list of (node in [0, 1], weight); the nodes double."""
        if self.method == "first_order":
            yield [(0.0, 1.0)]
            return
        n = min(FEWEST_NODES, self.max_nodes)
        while n <= self.max_nodes:
            nodes, weights = np.polynomial.legendre.leggauss(n)
            yield [((1 + x) / 2, w / 2) for x, w in zip(nodes.tolist(), weights.tolist(), strict=True)]
            n *= 2


@dataclass(frozen=True)
class StraightPath:
    """A straight integration path between two models along some of their parameters.

    Attributes:
        gradients: how gradients are taken; shared by the paths of one call.
        start: all tensors where the path begins.
        stop: parameters where it ends.
        moved: names of those that are moved; all else is that of `start` throughout, buffers too.
        probe: what the measure is evaluated on.
        name: how errors name it.
    """

    gradients: MeasureGradients
    start: Mapping[str, Tensor]
    stop: Mapping[str, Tensor]
    moved: Collection[str]
    probe: object
    name: str

    @cached_property
    def _space(self) -> Workspace:
        """Memory for the parameters at nodes."""
        return Workspace()

    def mean_gradient(
        self, name: str, measure: Measure, change_of_measure: float, quadrature: Quadrature
    ) -> tuple[dict[str, Tensor], int]:
        """The measure's gradient averaged over the path, by moved parameter in its dtype (fp32 or more), and the
        number of nodes.

        Nodes are doubled until the gradient times the change of the parameters is the change of the measure
        to within the tolerance, or there are no more. A parameter the measure does not read has gradient zero.

        Raises:
            ValueError: the measure cannot be differentiated.
            NonFiniteGradient: its gradient is NaN or infinite; names the contrast and the parameter.
        """
        mean: dict[str, Tensor] = {}
        n_nodes = 0
        others = {n: t for n, t in self.start.items() if n not in self.moved}
        query = MeasureQuery(name, measure, self.probe, others, self.name)
        for rule in quadrature.rules():
            mean = {
                n: torch.zeros_like(self.start[n], dtype=_at_least_fp32(self.start[n])) for n in self.moved
            }
            for chunk in chunks(rule, models_per_stack((self.start[n] for n in self.moved), QUARTER)):
                nodes, weights = zip(*chunk, strict=True)
                self.gradients.add_to(mean, query, self._at(nodes), weights)
            n_nodes = len(rule)
            parts = self._parts(mean)
            if abs(sum(parts) - change_of_measure) <= quadrature.tolerance * sum(map(abs, parts)):
                break
        vars(self).pop("_space", None)  # while the mean is summed over sites
        return mean, n_nodes

    def refined(
        self,
        name: str,
        measure: Measure,
        trapezoid: Mapping[str, Tensor],
        change_of_measure: float,
        tolerance: float,
        max_nodes: int,
    ) -> tuple[dict[str, Tensor], int, float]:
        """The measure's mean gradient by Simpson's rule on halved and halved intervals, the number of nodes, and
        that gradient times the change of the parameters.

        Args:
            name, measure: of the measure.
            trapezoid: half the sum of the gradients at both ends, by trained parameter.
            change_of_measure, tolerance: where to stop, as `mean_gradient`.
            max_nodes: at most so many, both ends among them; fewer than three leave the trapezoid.
        """
        others = {n: t for n, t in self.start.items() if n not in self.moved}
        query = MeasureQuery(name, measure, self.probe, others, self.name)
        coarse, mean, n_nodes, intervals = dict(trapezoid), dict(trapezoid), 2, 1
        parts = self._parts(mean)
        while 2 * intervals + 1 <= max_nodes:
            inside = [((i + 0.5) / intervals, 1 / intervals) for i in range(intervals)]
            fine = {n: g / 2 for n, g in coarse.items()}
            for chunk in chunks(inside, models_per_stack((self.start[n] for n in self.moved), QUARTER)):
                nodes, weights = zip(*chunk, strict=True)
                for n, g in self.gradients.summed(query, self._at(nodes), weights).items():
                    fine[n] = fine[n] + g.to(fine[n].dtype) / 2
            mean = {n: (4 * fine[n] - g) / 3 for n, g in coarse.items()}
            coarse, intervals = fine, 2 * intervals
            n_nodes = intervals + 1
            parts = self._parts(mean)
            if abs(sum(parts) - change_of_measure) <= tolerance * sum(map(abs, parts)):
                break
        return mean, n_nodes, sum(parts)

    def elements(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient times the change of one parameter, element by element in fp64."""
        found = torch.empty_like(gradient, dtype=torch.float64, memory_format=torch.contiguous_format)
        flat, of_each = found.view(-1), gradient.reshape(-1)

        def fill(at: slice) -> None:
            torch.mul(of_each[at], self._change_of(name, at), out=flat[at])

        spread(fill, blocks(flat))
        return found

    def _parts(self, mean: Mapping[str, Tensor]) -> list[float]:
        """A gradient times the change of each parameter, in fp64."""

        def of_block(unit: tuple[str, slice]) -> Tensor:
            name, at = unit
            return (mean[name].reshape(-1)[at] * self._change_of(name, at)).sum()

        units = [(n, at) for n, g in mean.items() for at in blocks(g)]
        total: dict[str, float] = dict.fromkeys(mean, 0.0)
        for (name, _), part in zip(units, torch.stack(spread(of_block, units)).tolist(), strict=True):
            total[name] += part
        return list(total.values())

    def _change_of(self, name: str, at: slice) -> Tensor:
        """Stop − start of a block of one parameter, in fp64."""
        start, stop = (tensors[name].detach().reshape(-1)[at] for tensors in (self.start, self.stop))
        return stop.double() - start.double()

    def _at(self, nodes: Sequence[float]) -> dict[str, Tensor]:
        """Moved parameters at start + node · change: [n_nodes, *shape], which hold until it is called again."""
        found = {n: self._space.empty(n, self.start[n], len(nodes), *self.start[n].shape) for n in self.moved}

        def fill(unit: tuple[str, slice]) -> None:
            name, at = unit
            start = self.start[name].detach().reshape(-1)[at]
            step = self._change_of(name, at).to(start.dtype)
            for node, out in zip(nodes, found[name].view(len(nodes), -1), strict=True):
                torch.add(start, step, alpha=node, out=out[at])

        spread(fill, [(n, at) for n in self.moved for at in blocks(self.start[n])])
        return found


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
