"""The seed's algorithm, as obvious as it gets: for every site copy the model, overwrite gradients, step, measure.

What `benchmark.py` runs beside the verbs, on the same gradients. Nothing here is fast on purpose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from checkpoints import Checkpoint
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site

Measure = Callable[[nn.Module, Any], Tensor]
Gradients = dict[str, Tensor | None]


def revived(recipe: Recipe, state: Checkpoint) -> tuple[nn.Module, Optimizer]:
    """A copy of the model at the checkpoint and its optimizer."""
    model = copy.deepcopy(recipe.model)
    optimizer = recipe.optimizer(model.parameters())
    scheduler = recipe.scheduler(optimizer)
    state.restore(model, optimizer if state.optimizer else None, scheduler if state.scheduler else None)
    return model, optimizer


def backward(recipe: Recipe, model: nn.Module, batch: Any) -> Gradients:
    """The gradient by an ordinary backward pass."""
    model.train()
    model.zero_grad()
    recipe.loss(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def stepped(recipe: Recipe, start: tuple[nn.Module, Optimizer], gradients: Gradients) -> nn.Module:
    """A copy of the model after clipping and one step."""
    model, optimizer = copy.deepcopy(start)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]
    clip_grad_norm_(model.parameters(), recipe.clip.max_norm)
    optimizer.step()
    return model


def measured(model: nn.Module, measure: Measure, contrast: Contrast) -> float:
    """The measure in eval mode."""
    model.eval()
    with torch.no_grad():
        return float(measure(model, contrast.probe).mean())


def exchanged(base: Gradients, source: Gradients, site: Site) -> Gradients:
    """The base gradient with the source's on a site."""
    found = {name: None if g is None else g.clone() for name, g in base.items()}
    for name, index in site.covers.items():
        found[name][index] = source[name][index]
    return found


def patch_gradients(
    recipe: Recipe, state: Checkpoint, contrasts: Sequence[Contrast], sites: Sequence[Site], measure: Measure
) -> Iterator[float]:
    """`patched` of each contrast and site."""
    start = revived(recipe, state)
    for contrast in contrasts:
        base, source = (
            backward(recipe, copy.deepcopy(start[0]), b) for b in (contrast.base, contrast.source)
        )
        for site in sites:
            yield measured(stepped(recipe, start, exchanged(base, source, site)), measure, contrast)


def patch_updates(
    recipe: Recipe, state: Checkpoint, contrasts: Sequence[Contrast], sites: Sequence[Site], measure: Measure
) -> Iterator[float]:
    """`patched` of each contrast and site."""
    start = revived(recipe, state)
    for contrast in contrasts:
        base, source = (
            stepped(recipe, start, backward(recipe, copy.deepcopy(start[0]), batch))
            for batch in (contrast.base, contrast.source)
        )
        for site in sites:
            model = copy.deepcopy(base)
            with torch.no_grad():
                for name, index in site.covers.items():
                    model.get_parameter(name)[index] = source.get_parameter(name)[index]
            yield measured(model, measure, contrast)


def patch_signals(
    recipe: Recipe, state: Checkpoint, contrasts: Sequence[Contrast], sites: Sequence[Site], measure: Measure
) -> Iterator[float]:
    """`patched` of each contrast and site: a backward pass with a hook for every site."""
    start = revived(recipe, state)
    for contrast in contrasts:
        signals: dict[str, Tensor] = {}

        def keeping(name: str, signals: dict[str, Tensor] = signals) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                output.register_hook(lambda signal: signals.__setitem__(name, signal.clone()))

            return hook

        model = copy.deepcopy(start[0])
        for name in {name for site in sites for name in site.covers}:
            model.get_submodule(name).register_forward_hook(keeping(name))
        backward(recipe, model, contrast.source)
        for site in sites:
            model = copy.deepcopy(start[0])
            for name, index in site.covers.items():

                def replacing(
                    module: nn.Module,
                    inputs: Any,
                    output: Tensor,
                    theirs: Tensor = signals[name],
                    at: Any = index,
                ) -> None:
                    def replaced(signal: Tensor) -> Tensor:
                        signal = signal.clone()
                        signal[at] = theirs[at]
                        return signal

                    output.register_hook(replaced)

                model.get_submodule(name).register_forward_hook(replacing)
            gradients = backward(recipe, model, contrast.base)
            yield measured(stepped(recipe, start, gradients), measure, contrast)


LOOPS = {"patch_gradients": patch_gradients, "patch_updates": patch_updates, "patch_signals": patch_signals}
