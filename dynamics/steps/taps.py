"""Hooks on submodules for one forward and backward pass: activations and backward signals, read or replaced.

A backward signal dL/da is replaced inside the graph, by an autograd function that is the identity forward.
Module backward hooks are not used: several at one place do not chain, and with a frozen input they never fire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dynamics.recipe import RecipeError
from dynamics.sites import Site, SiteError
from dynamics.sites.outputs import attach
from dynamics.sites.site import check_index
from dynamics.trees import described, mask

Forward = Literal["base", "source"]
"""Whose activation goes forward where a signal is exchanged."""


class Taps:
    """Passes the outputs of some submodules through a function, for as long as it is attached.

    Args:
        names: submodules by name. A module that runs several times is tapped at each of its runs.
        change: (name, key, activation) -> activation. The key is the module's name, with the number of the run
            appended from the second on: `lstm`, `lstm[1]`.
        check: called with the number of runs of each module once the forward pass is over.
        raw: tap what the module's forward gives, before other hooks on the module change it; otherwise after.
        keeps_graph: whether the pass can be taken backward again.

    Attributes:
        leaves: activations without a graph that were made leaves of one, so that signals reach them.
        parameters: by name, the leaves of a graph that is kept.
    """

    def __init__(
        self,
        names: Iterable[str],
        change: Callable[[str, str, Tensor], Tensor],
        check: Callable[[Mapping[str, int]], None] = lambda runs: None,
        raw: bool = False,
        keeps_graph: bool = False,
    ) -> None:
        self.names = list(names)
        self.raw = raw
        self.keeps_graph = keeps_graph
        self.parameters: dict[str, Tensor] = {}
        self.change = change
        self.check = check
        self.leaves: list[Tensor] = []
        self._runs: Counter[str] = Counter()
        self._forward_is_over = False

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """The model's hooks are as they were on the way out, whatever happens."""
        self._runs.clear()
        self._forward_is_over = False
        handles: list[Callable[[], None]] = []
        try:
            for name in self.names:
                handles.append(attach(model, name, partial(self._hook, name), first=self.raw))
            yield
        finally:
            for remove in handles:
                remove()

    def forward_is_over(self) -> None:
        """From here on the pass goes backward: a module that runs again is recomputed."""
        self._forward_is_over = True
        self.check(self._runs)

    def _hook(self, name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        if self._forward_is_over:
            raise RecipeError(
                f"{name!r} is recomputed in the backward pass (activation checkpointing), where its signal cannot "
                "be read or exchanged. Turn it off, as model.gradient_checkpointing_disable() does."
            )
        number = self._runs[name]
        self._runs[name] += 1
        key = f"{name}[{number}]" if number else name
        return first_changed(output, lambda tensor: self.change(name, key, tensor))


def first_changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
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

    def __repr__(self) -> str:
        return described(self)


def reading(names: Iterable[str], into: Cache, raw: bool = False) -> Taps:
    """Taps that keep what passes: activations and, in the backward pass, their signals; `raw` as in `Taps`."""

    def change(name: str, key: str, activation: Tensor) -> Tensor:
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_()
            taps.leaves.append(activation)
        into.activations[key] = activation.detach().clone()
        into.signals[key] = torch.zeros_like(into.activations[key])
        passed = activation.clone()
        if passed.requires_grad:
            passed.register_hook(lambda signal: into.signals.__setitem__(key, signal.detach().clone()))  # type: ignore[no-untyped-call]
        return passed

    taps = Taps(names, change, raw=raw)
    return taps


def exchanging(site: Site, source: Cache, forward: Forward) -> Taps:
    """Taps that replace the backward signal on a site by the source run's.

    Args:
        site: covers submodules by name; what an index covers is exchanged at every run of the module.
        source: the source run's activations and signals at those submodules.
        forward: "base" leaves the forward pass alone; "source" gives the source's activation forward as well,
            straight through: the graph is not severed.
    """

    def check(runs: Mapping[str, int]) -> None:
        for name in site.covers:
            n_source = len(runs_of(source.signals, name))
            if runs[name] != n_source:
                raise SiteError(
                    f"Site {site.label!r}: {name!r} runs {runs[name]} times in the base run and {n_source} times "
                    "in the source run; signals are exchanged run by run."
                )

    def change(name: str, key: str, activation: Tensor) -> Tensor:
        if key not in source.signals:
            return activation  # the check after the forward pass tells
        signal = source.signals[key]
        if signal.shape != activation.shape:
            raise SiteError(
                f"Site {site.label!r}: {key!r} has shape {tuple(activation.shape)} in the base run and "
                f"{tuple(signal.shape)} in the source run. Give both batches the same shape, or pad them."
            )
        covered = mask(site.covers[name], activation.shape, activation.device)
        value = activation.detach()
        if forward == "source":
            value = _laid_out_as(value, torch.where(covered, source.activations[key], value))
        return _Exchange.apply(activation, value, covered, signal)  # type: ignore[no-any-return, no-untyped-call]

    return Taps(site.covers, change, check)


def runs_of(kept: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """What was kept of a submodule, run by run."""
    keys = (f"{name}[{n}]" if n else name for n in count())
    return [kept[key] for key in takewhile(kept.__contains__, keys)]


def check_covers(site: Site, source: Cache) -> None:
    """Raise a SiteError unless each index fits every recorded activation of its module."""
    for name, index in site.covers.items():
        runs = runs_of(source.activations, name)
        if not runs:
            raise SiteError(
                f"Site {site.label!r} covers {name!r}, which gave no floating-point tensor in the source run. "
                "Its module did not run, or not by being called. sites.hooks(model) lists all submodules."
            )
        for activation in runs:
            check_index(site.label, name, index, activation)


def _laid_out_as(like: Tensor, values: Tensor) -> Tensor:
    """The values in the memory layout of another tensor: sums over them then round alike."""
    return torch.empty_like(like).copy_(values)


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
        return _laid_out_as(arriving, torch.where(covered, signal, arriving)), None, None, None
