"""Layers that act with other parameters at some positions of a sequence alone, on what they read in that pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dynamics.engine.measuring import Measuring
from dynamics.engine.runs import Variants
from dynamics.models.functional import call_with
from dynamics.models.projections import ITSELF, Projection, first_tensor, projections
from dynamics.sites import Site, SiteError
from dynamics.steps.factors import MIXING
from dynamics.steps.stacks import Stack
from dynamics.steps.taps import first_changed
from dynamics.trees import exchanged

T = TypeVar("T")
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

AT = "at positions: "
"""Before the name of a tensor that takes the place of the model's own at some positions."""

POSITIONS = "which positions"
"""The name of those, [n]: int64, from either end."""

_NONE = 2**62
"""A position that no sequence has."""

_MIXES = (
    "{!r} mixes positions, so it cannot act at some of them alone. Leave out positions, or let the module declare "
    "projections() that work on each position by itself."
)


@dataclass(frozen=True)
class Layer:
    """A projection of a model, and what its tensors are called in the model.

    Attributes:
        owner, module: the module that declares it.
        projection: what it reads, writes and computes.
        names: parameters and buffers by their name in the module.
    """

    owner: str
    module: nn.Module
    projection: Projection
    names: Mapping[str, str]

    def written(self, others: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """What it writes with other tensors in place of the module's current ones."""
        held = {n: getattr(self.module, n) for n in self.projection.parameters}
        current = {**held, **dict(self.module.named_buffers())}
        tensors = {n: others.get(self.names[n], t) for n, t in current.items() if t is not None}
        return first_tensor(self.projection.apply(tensors, *inputs[0], **inputs[1]))

    def inner(self, name: str) -> str:
        """The name in the model of one of the owner's submodules."""
        return ".".join(part for part in (self.owner, name) if part)


Change = Callable[[Layer, Inputs, Tensor], Tensor]


def layers_of(model: nn.Module, covered: Iterable[str]) -> list[Layer]:
    """The projections that hold some of the tensors.

    Raises:
        SiteError: no projection holds one of them.
    """
    wanted = set(covered)
    parameters = {id(p): name for name, p in model.named_parameters()}
    found = []
    for owner, projection in projections(model):
        module = model.get_submodule(owner)
        held = {n: parameters[id(p)] for n in projection.parameters if (p := getattr(module, n)) is not None}
        buffers = {n: f"{owner}.{n}" if owner else n for n, _ in module.named_buffers()}
        layer = Layer(owner, module, projection, {**buffers, **held})
        if wanted & set(layer.names.values()):
            found.append(layer)
    if homeless := wanted - {name for layer in found for name in layer.names.values()}:
        raise SiteError(
            f"{min(homeless)!r} belongs to no projection, so it cannot act at some positions alone: its module "
            "holds parameters beside submodules of its own. Let it declare them in a method projections() (see "
            "dynamics.models.projections), or exchange the site whole."
        )
    return found


@dataclass(frozen=True)
class PositionwiseCall:
    """Calls a model, with tensors called `AT + name` in the place of `name` at the positions `POSITIONS` alone.

        y[p] = W x[p] + 1[p ∈ P] (W' − W) x[p]

    x is what the layer reads in this very pass. Without `POSITIONS` they act at all.

    Attributes:
        sites: those with positions, whose positions every sequence must have.
    """

    sites: Sequence[Site]

    def __call__(
        self,
        function: Callable[[nn.Module, Any], T],
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        batch: Any,
    ) -> T:
        """As `call_with`."""
        others = {name.removeprefix(AT): t for name, t in tensors.items() if name.startswith(AT)}
        if not others:
            return call_with(function, model, tensors, batch)
        own = {n: t for n, t in tensors.items() if not n.startswith(AT) and n != POSITIONS}
        base = {n: torch.zeros_like(t) + own[n] for n, t in others.items()}  # in stacks alike, to round alike
        change = partial(self._exchanged, others, base, tensors.get(POSITIONS))
        with _tapped(model, layers_of(model, others), change):
            return call_with(function, model, own, batch)

    def _exchanged(
        self,
        others: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        positions: Tensor | None,
        layer: Layer,
        inputs: Inputs,
        written: Tensor,
    ) -> Tensor:
        new = written + (layer.written(others, inputs) - layer.written(base, inputs))
        if positions is None:
            return new
        n = written.shape[1] if written.ndim > 2 else 0
        for site in self.sites:
            if any(not -n <= p < n for p in site.positions or ()):
                raise SiteError(f"Site {site.label!r}: {layer.owner!r} writes {tuple(written.shape)}.")
        places = torch.where(positions < 0, positions + n, positions)
        here = (torch.arange(n, device=places.device)[:, None] == places).any(-1)
        return torch.where(here.view(n, *[1] * (written.ndim - 2)), new, written)

    def check(
        self, measuring: Measuring, base: Mapping[str, Tensor], source: Mapping[str, Tensor], probe: Any
    ) -> None:
        """Raise a SiteError where layers that sites cover mix positions, or where others read their tensors."""
        once = {id(site.covers): site for site in reversed(self.sites)}  # `at_positions` repeats them
        names = dict.fromkeys(name for site in self.sites for name in site.covers)
        with _tapped(measuring.recipe.model, layers_of(measuring.recipe.model, names), _expect_no_mixing):
            measuring.one_model(base, probe)
        for site in once.values():
            mixed: Mapping[str, Any] = exchanged(base, source, site.covers)
            there = {AT + name: mixed[name] for name in site.covers}
            whole = measuring.one_model(mixed, probe)
            everywhere = measuring.one_model({**base, **there}, probe)
            if not np.allclose(whole, everywhere, *measuring.tolerance, equal_nan=True):
                raise SiteError(
                    f"Site {site.label!r}: {', '.join(site.covers)} is used where its module is not called, so it "
                    "cannot act at some positions alone. Exchange it whole: leave out positions."
                )


def located(
    variants: Iterable[Variants], base: Mapping[str, Tensor], sites: Sequence[Site]
) -> Iterator[Variants]:
    """The same variants of a base model, whose tensors act at the positions of their sites alone.

    Args:
        variants: of all sites in order, one each.
        base: all tensors of the base model.
        sites: with positions.
    """
    waiting = iter(sites)
    device = next(iter(base.values())).device
    for some in variants:
        rows = [(), *(site.positions or () for site in islice(waiting, len(some.models) - 1))]
        widest = max(map(len, rows))
        padded = [[*row, *[_NONE] * (widest - len(row))] for row in rows]
        stacked = {AT + name: tensor for name, tensor in some.models.stacked.items()}
        stacked[POSITIONS] = torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), widest)
        yield Variants(Stack(len(some.models), base, stacked), None)


def _expect_no_mixing(layer: Layer, inputs: Inputs, written: Tensor) -> Tensor:
    """What was written, unless a position of it depends on what the layer read at others."""
    if isinstance(layer.module, MIXING):
        raise SiteError(_MIXES.format(layer.owner))
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            leaves.append(tensor := tensor.detach().requires_grad_())
        return tensor

    with torch.enable_grad():
        again = layer.written({}, tree_map_only(Tensor, leaf, inputs))
    for position in {0, written.shape[1] - 1} if written.ndim > 2 and leaves else ():
        signal = torch.zeros_like(again)
        drawn = torch.randn(signal[:, position].shape, generator=torch.Generator().manual_seed(0))
        signal[:, position] = drawn.to(signal)
        for read in torch.autograd.grad(again, leaves, signal, retain_graph=True, allow_unused=True):
            if read is not None and (read.ndim < 2 or bool(_without(read, position).any())):
                raise SiteError(_MIXES.format(layer.owner))
    return written


def _without(tensor: Tensor, position: int) -> Tensor:
    rest = tensor.clone()
    rest[:, position] = 0
    return rest


@contextmanager
def _tapped(model: nn.Module, layers: Sequence[Layer], change: Change) -> Iterator[None]:
    """Inside, what each layer writes is passed through `change(layer, inputs, written)`."""
    read: dict[int, Inputs] = {}
    handles = []

    def keep_arguments(i: int, module: nn.Module, arguments: Any, keywords: Any) -> None:
        read[i] = arguments, keywords

    def keep_output(i: int, module: nn.Module, arguments: Any, output: Any) -> None:
        read[i] = (first_tensor(output),), {}

    def changed(i: int, module: nn.Module, arguments: Any, output: Any) -> Any:
        if i not in read:
            return output
        return first_changed(output, partial(change, layers[i], read.pop(i)))

    try:
        for i, layer in enumerate(layers):
            reads, writes = layer.projection.reads, layer.projection.writes
            if reads == ITSELF:
                hook = partial(keep_arguments, i)
                handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                reader = model.get_submodule(layer.inner(reads))
                handles.append(reader.register_forward_hook(partial(keep_output, i)))
            writer = model.get_submodule(layer.inner(writes))
            handles.append(writer.register_forward_hook(partial(changed, i), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
