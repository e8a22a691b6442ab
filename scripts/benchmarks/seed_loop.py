"""The seed's algorithm, as obvious as it gets: for every site copy, overwrite gradients, step, measure.

What `patching_speed.py` runs beside the verbs, on the same gradients. Nothing here is fast on purpose.
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
Start = tuple[nn.Module, Optimizer]


def revived(recipe: Recipe, state: Checkpoint) -> Start:
    """A copy of the model at the checkpoint and its optimizer."""
    model = copy.deepcopy(recipe.model)
    optimizer = recipe.optimizer(model.parameters())
    scheduler = recipe.scheduler(optimizer) if recipe.scheduler else None
    state.restore(model, optimizer if state.optimizer else None, scheduler if state.scheduler else None)
    return model, optimizer


def backward(recipe: Recipe, model: nn.Module, batch: Any) -> Gradients:
    """The gradient by an ordinary backward pass."""
    model.train()
    model.zero_grad()
    recipe.loss(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def stepped(recipe: Recipe, start: Start, gradients: Gradients) -> nn.Module:
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


def by_gradients(
    recipe: Recipe, start: Start, contrast: Contrast, sites: Sequence[Site]
) -> Iterator[nn.Module]:
    """The model of each site for `patch_gradients`."""
    base, source = (backward(recipe, copy.deepcopy(start[0]), b) for b in (contrast.base, contrast.source))
    for site in sites:
        yield stepped(recipe, start, exchanged(base, source, site))


def by_updates(
    recipe: Recipe, start: Start, contrast: Contrast, sites: Sequence[Site]
) -> Iterator[nn.Module]:
    """The model of each site for `patch_updates`."""
    base, source = (
        stepped(recipe, start, backward(recipe, copy.deepcopy(start[0]), batch))
        for batch in (contrast.base, contrast.source)
    )
    for site in sites:
        model = copy.deepcopy(base)
        with torch.no_grad():
            for name, index in site.covers.items():
                model.get_parameter(name)[index] = source.get_parameter(name)[index]
        yield model


def by_signals(
    recipe: Recipe, start: Start, contrast: Contrast, sites: Sequence[Site]
) -> Iterator[nn.Module]:
    """The model of each site for `patch_signals`: a backward pass with a hook for every site."""
    signals: dict[str, Tensor] = {}

    def keeping(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(lambda signal: signals.__setitem__(name, signal.clone()))

        return hook

    def replacing(theirs: Tensor, at: Any) -> Callable[..., None]:
        def replaced(signal: Tensor) -> Tensor:
            signal = signal.clone()
            signal[at] = theirs[at]
            return signal

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(replaced)

        return hook

    model = copy.deepcopy(start[0])
    for name in {name for site in sites for name in site.covers}:
        model.get_submodule(name).register_forward_hook(keeping(name))
    backward(recipe, model, contrast.source)
    for site in sites:
        model = copy.deepcopy(start[0])
        for name, index in site.covers.items():
            model.get_submodule(name).register_forward_hook(replacing(signals[name], index))
        yield stepped(recipe, start, backward(recipe, model, contrast.base))


MODELS = {"patch_gradients": by_gradients, "patch_updates": by_updates, "patch_signals": by_signals}


def patched(
    verb: str,
    recipe: Recipe,
    state: Checkpoint,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure,
) -> Iterator[float]:
    """`patched` of each contrast and site, as a verb has it."""
    start = revived(recipe, state)
    for contrast in contrasts:
        for model in MODELS[verb](recipe, start, contrast, sites):
            yield measured(model, measure, contrast)
