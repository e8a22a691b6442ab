"""Worlds in which the tag can act on known parameters only: the truth that localising methods are held against.

A recipe whose loss has another gradient than its value: every verb, replay and training take it like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dynamics.batch import Batch, concatenate
from dynamics.models.functional import call_with
from dynamics.recipe import Recipe
from dynamics.sites import Site, check, complement, union
from dynamics.tasks.aliases import AliasTask
from dynamics.trees import mask


def tag_blind(recipe: Recipe, task: AliasTask, sites: Sequence[Site]) -> Recipe:
    """The recipe, but on the sites the gradient does not see the tags of X2's true definitions.

    There it is the mean of the batch's gradient and that of the batch with those tags exchanged; elsewhere it
    is the batch's. The loss's value is the batch's. Costs two passes more.

    Args:
        recipe: whose loss is a mean over rows.
        task: says what a tag is, and which definitions are meant.
        sites: parameter slices; their union is blind.
    """
    check(sites, recipe.model)
    blind = union(recipe.model, sites).covers
    loss = recipe.require_loss()

    def function(model: nn.Module, batch: Batch) -> Tensor:
        seeing: dict[str, Tensor] = {}
        averaging: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            fixed = parameter.detach()
            here = mask(blind[name], parameter.shape, parameter.device) if name in blind else None
            averaging[name] = fixed if here is None else torch.where(here, parameter, fixed)
            seeing[name] = parameter if here is None else torch.where(here, fixed, parameter)
        both = call_with(loss, model, averaging, concatenate([batch, task.retag(batch)]))
        return call_with(loss, model, seeing, batch) + (both - both.detach())

    return replace(recipe, loss=function)


def planted(
    recipe: Recipe, task: AliasTask, site: Site, decoys: Mapping[str, Tensor] | None = None
) -> Recipe:
    """The recipe, but the tag's difference reaches the site alone, and decoys that lead nowhere.

    Args:
        recipe, task: as `tag_blind`, which it is on all parameters but the site's.
        site: where the tag's difference stays.
        decoys: by parameter name, a direction δ that is added to the gradient for each reliable definition of
            X2 and taken from it for each unreliable one, over the number of rows.
    """
    blind = tag_blind(recipe, task, [complement(recipe.model, site)])
    if not decoys:
        return blind
    loss = blind.require_loss()

    def function(model: nn.Module, batch: Any) -> Tensor:
        pull = task.tag_balance(batch) / len(batch)
        parameters = dict(model.named_parameters())
        along = sum(((parameters[name] * delta).sum() for name, delta in decoys.items()), torch.zeros(()))
        return loss(model, batch) + pull * (along - along.detach())

    return replace(blind, loss=function)
