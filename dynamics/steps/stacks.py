"""Stack: several models of one architecture that have some of their tensors in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """n models, by the tensors that all share and those that each has of its own.

    Attributes:
        n: number of models.
        shared: parameters and buffers alike in all, by name.
        stacked: the others by name, [n, *shape].
    """

    n: int
    shared: Mapping[str, Tensor]
    stacked: Mapping[str, Tensor]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """One model's tensors, views of the stack's."""
        return {**self.shared, **{name: tensor[i] for name, tensor in self.stacked.items()}}

    def part(self, start: int, stop: int) -> Stack:
        """Some of the models, as views."""
        return Stack(stop - start, self.shared, {n: tensor[start:stop] for n, tensor in self.stacked.items()})

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(self.n))


class Workspace:
    """Memory for stacks that are used one after another: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def empty(self, key: object, like: Tensor, *shape: int) -> Tensor:
        """A contiguous tensor of the given shape, and of the dtype and device of `like`; what was given out under
        the same key before is overwritten."""
        held = self._held.get(key)
        n = math.prod(shape)
        if held is None or held.numel() < n or held.dtype != like.dtype or held.device != like.device:
            held = self._held[key] = like.new_empty(n)
        return held[:n].view(shape)


def stack(models: Sequence[Mapping[str, Tensor]]) -> Stack:
    """Tensors of several models as a stack: what is equal in all is shared, the first one's; others are copied."""
    first = models[0]
    shared = {n: t for n, t in first.items() if all(m[n] is t or torch.equal(m[n], t) for m in models)}
    stacked = {name: torch.stack([m[name] for m in models]) for name in first if name not in shared}
    return Stack(len(models), shared, stacked)
