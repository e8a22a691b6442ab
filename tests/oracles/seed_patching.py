"""The seed's gradient patching, written the obvious way: copy the model, overwrite slices of .grad, step."""

import copy
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

import dynamics as dy
from dynamics.sites import Site
from tests.zoo.small_models import Live, clip

Measure = Callable[[nn.Module, Any], Tensor]


def seed_patch(
    recipe: dy.Recipe,
    live: Live,
    contrast: dy.Contrast,
    site: Site,
    measures: Mapping[str, Measure],
    fresh: bool = False,
    gradients: tuple[dict[str, Tensor | None], dict[str, Tensor | None]] | None = None,
) -> dict[str, float]:
    """Each measure after one patched step from where the live model stands.

    Args:
        recipe: loss, clipping and the optimizer to begin anew with.
        live: the model and the optimizer in training; copied, never stepped.
        contrast, site, measures: as the verb takes them.
        fresh: begin a new optimizer instead of copying the live one.
        gradients: of the base and of the source batch, in place of backward passes of our own.
    """
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    if fresh:
        optimizer = recipe.optimizer(list(model.parameters()))
    base, source = gradients or (
        backward(recipe, model, contrast.base),
        backward(recipe, model, contrast.source),
    )
    for name, parameter in model.named_parameters():
        parameter.grad = None if base[name] is None else base[name].clone()
    for name, index in site.covers.items():
        parameter = model.get_parameter(name)
        if isinstance(index, EllipsisType):
            parameter.grad = None if source[name] is None else source[name].clone()
        else:
            parameter.grad[index] = source[name][index]
    clip(recipe, model)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        return {name: measure(model, contrast.probe).mean().item() for name, measure in measures.items()}


def backward(recipe: dy.Recipe, model: nn.Module, batch: Any) -> dict[str, Tensor | None]:
    """The gradient of a batch by an ordinary backward pass on a copy."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    recipe.loss(twin, batch).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}
