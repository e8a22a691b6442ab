"""Taps: what passes through a model's submodules during one forward and backward pass, read or replaced.

A backward signal dL/da is replaced inside the graph, by an autograd function that is the identity forward.
Module backward hooks are not used: several at one place do not chain, and with a frozen input they never fire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dynamics.sites import Site, SiteError
from dynamics.sites.site import check_index
from dynamics.trees import mask

Forward = Literal["base", "source"]
"""Whose activation goes forward where a signal is exchanged."""


class Taps:
    """Passes the outputs of some submodules through a function, for as long as it is attached.

    Args:
        names: submodules by name. A module that runs several times is tapped at each of its runs.
        change: (key, activation) -> activation. The key is the module's name, with the number of the run
            appended from the second on: `lstm`, `lstm[1]`.

    Attributes:
        leaves: activations without a graph that were made leaves of one, so that signals reach them.
    """

    def __init__(self, names: Iterable[str], change: Callable[[str, Tensor], Tensor]) -> None:
        self.names = list(names)
        self.change = change
        self.leaves: list[Tensor] = []

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """The model's hooks are as they were on the way out, whatever happens."""
        runs: Counter[str] = Counter()
        handles = []

        def hook_of(name: str) -> Callable[[nn.Module, Any, Any], Any]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
                key = f"{name}[{runs[name]}]" if runs[name] else name
                runs[name] += 1
                return _first_changed(output, lambda tensor: self.change(key, tensor))

            return hook

        try:
            for name in self.names:
                handles.append(model.get_submodule(name).register_forward_hook(hook_of(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _first_changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its first floating-point tensor changed; an LSTM's is its hidden states."""
    leaves, structure = tree_flatten(output)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[place] = change(leaf)
            return tree_unflatten(leaves, structure)
    return output


@dataclass(frozen=True)
class Cache:
    """One run's forward activations a and backward signals dL/da, by hook name; detached.

    Attributes:
        activations: as the module gave them, shapes as in the model.
        signals: dL/da of the same shapes; zero where the loss does not depend on the activation.
    """

    activations: dict[str, Tensor] = field(default_factory=dict)
    signals: dict[str, Tensor] = field(default_factory=dict)


def reading(names: Iterable[str], into: Cache) -> Taps:
    """Taps that keep what passes: activations and, in the backward pass, their signals."""

    def change(key: str, activation: Tensor) -> Tensor:
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_()
            taps.leaves.append(activation)
        into.activations[key] = activation.detach().clone()
        into.signals[key] = torch.zeros_like(into.activations[key])
        passed = activation.clone()
        if passed.requires_grad:
            passed.register_hook(lambda signal: into.signals.__setitem__(key, signal.detach().clone()))  # type: ignore[no-untyped-call]
        return passed

    taps = Taps(names, change)
    return taps


def exchanging(site: Site, source: Cache, forward: Forward) -> Taps:
    """Taps that replace the backward signal on a site by the source run's.

    Args:
        site: covers submodules by name; what an index covers is exchanged at every run of the module.
        source: the source run's activations and signals at those submodules.
        forward: "base" leaves the forward pass alone; "source" gives the source's activation forward as well,
            straight through: the graph is not severed.
    """

    def change(key: str, activation: Tensor) -> Tensor:
        name, _, _ = key.partition("[")
        if key not in source.signals:
            raise SiteError(
                f"Site {site.label!r}: {name!r} runs more often in the base run than in the source run."
            )
        signal = source.signals[key]
        if signal.shape != activation.shape:
            raise SiteError(
                f"Site {site.label!r}: {key!r} has shape {tuple(activation.shape)} in the base run and "
                f"{tuple(signal.shape)} in the source run. Give both batches the same shape, or pad them."
            )
        covered = mask(site.covers[name], activation.shape, activation.device)
        value = activation if forward == "base" else torch.where(covered, source.activations[key], activation)
        return _Exchange.apply(activation, value.detach(), covered, signal)  # type: ignore[no-any-return, no-untyped-call]

    return Taps(site.covers, change)


def check_covers(site: Site, shapes: Mapping[str, Tensor]) -> None:
    """Raise a SiteError unless each index fits the recorded activation."""
    for name, index in site.covers.items():
        if name not in shapes:
            raise SiteError(
                f"Site {site.label!r} covers {name!r}, which gave no floating-point tensor in the source run. "
                "Its module did not run, or not by being called. sites.hooks(model) lists all submodules."
            )
        check_index(site.label, name, index, shapes[name])


class _Exchange(torch.autograd.Function):
    """Forward: `value`, straight through. Backward: the signal where covered, elsewhere what arrives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(activation: Tensor, value: Tensor, covered: Tensor, signal: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, _, covered, signal = inputs
        ctx.save_for_backward(covered, signal)

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, None, None, None]:
        covered, signal = ctx.saved_tensors
        return torch.where(covered, signal, arriving), None, None, None
