"""Batched backward passes (vector-Jacobian products) from an activation down, for many exchanged signals at once.

Backward is linear: exchanging the signal λ at an activation a on a slice μ changes the gradient by (∂a/∂θ)ᵀ of
μ ⊙ (λ_source − λ_base). So one forward pass serves all sites, and one batched backward pass all sites of an
activation; parameters that are no ancestors of it keep the base run's gradient, the very tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from checkpoints import Checkpoint
from dynamics.recipe import Recipe
from dynamics.sites import Site
from dynamics.steps.fallbacks import Fallback, out_of_memory, reason
from dynamics.steps.gradients import StepGradient, gradient
from dynamics.steps.taps import Cache, Taps, runs_of
from dynamics.trees import Gradients, mask, squared_norm


class GraphTaps(Taps):
    """Taps that keep activations with their graph, and the signals that reach them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names, self._keep, keeps_graph=True)
        self.runs: dict[str, list[Tensor]] = {name: [] for name in names}
        self.signals: dict[str, Tensor] = {}
        """λ of activations that the loss depends on."""

    def _keep(self, name: str, key: str, activation: Tensor) -> Tensor:
        self.runs[name].append(activation)
        passed = activation.clone()  # what follows may write into it
        if passed.requires_grad:
            passed.register_hook(partial(self._arrives, name))  # type: ignore[no-untyped-call]
        return passed

    def _arrives(self, name: str, signal: Tensor) -> None:
        if name not in self.signals:  # later passes through the kept graph are not the run's own
            self.signals[name] = signal.detach().clone()


@dataclass(frozen=True)
class Pullbacks:
    """One run with its graph kept.

    Attributes:
        step: gradient and buffers of the run.
        taps: what was kept of it.
    """

    step: StepGradient
    taps: GraphTaps

    def takes(self, site: Site, source: Cache) -> bool:
        """Whether a site is a slice of one activation that the loss depends on and both runs computed once."""
        if len(site.covers) != 1:
            return False
        (name,) = site.covers
        ours, theirs = self.taps.runs.get(name, []), runs_of(source.signals, name)
        return (
            name in self.taps.signals and len(ours) == len(theirs) == 1 and ours[0].shape == theirs[0].shape
        )

    def exchanging(self, sites: Sequence[Site], source: Cache) -> list[StepGradient]:
        """The run's step with the source's signal on one of the sites each, all of them of one activation.

        Up to rounding what `gradient` gives with `taps.exchanging`, site by site, in a model whose backward is
        linear: hooks of its own may clip what flows there. Memory: a gradient for each site.

        Raises:
            Fallback: autograd cannot take these backward passes as one batch, or gives sparse gradients.
        """
        (name,) = {name for site in sites for name in site.covers}
        (activation,), theirs = self.taps.runs[name], source.signals[name]
        masks = torch.stack([mask(s.covers[name], activation.shape, activation.device) for s in sites])
        exchanges = masks * (theirs - self.taps.signals[name])
        parameters, base = self.taps.parameters, self.step.gradients
        several = len(sites) > 1
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # of an embedding's backward
                found = torch.autograd.grad(
                    activation,
                    list(parameters.values()),
                    exchanges if several else exchanges[0],
                    is_grads_batched=several,
                    retain_graph=True,
                    allow_unused=True,
                )
        except Exception as error:
            if out_of_memory(error):
                raise
            raise Fallback(reason(error)) from error  # an error of the user's own comes back site by site
        if any(pulled is not None and pulled.is_sparse for pulled in found):
            raise Fallback("gradients are sparse")
        moved = {
            p: (pulled if several else pulled[None]).add_(g)
            for p, pulled in zip(parameters, found, strict=True)
            if pulled is not None and (g := base[p]) is not None
        }
        return [
            replace(self.step, gradients={**base, **{p: g[i] for p, g in moved.items()}})
            for i in range(len(sites))
        ]


def alike(ours: Gradients, theirs: Gradients) -> bool:
    """Whether two gradients are one up to rounding: ‖difference‖ beside ‖theirs‖."""
    pairs = [(g, theirs[name]) for name, g in ours.items()]
    both = [(g, other) for g, other in pairs if g is not None and other is not None]
    if len(both) < sum(g is not None or other is not None for g, other in pairs):
        return False
    eps = max((torch.finfo(g.dtype).eps for g, _ in both), default=1.0)
    apart, size = (sum(map(squared_norm, part)) for part in ((g - h for g, h in both), (h for _, h in both)))
    return bool(apart**0.5 <= eps**0.7 * size**0.5)


def pullbacks(
    recipe: Recipe, checkpoint: Checkpoint, batch: Any, hooks: Sequence[str], where: str = "the batch"
) -> Pullbacks:
    """Take the gradient of a batch and keep the graph, from the activations of the given submodules down."""
    taps = GraphTaps(hooks)
    return Pullbacks(gradient(recipe, checkpoint, batch, where, taps), taps)
