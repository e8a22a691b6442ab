"""Restoring a checkpoint into a copy of the recipe's model, its optimizer and its scheduler."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from checkpoints import Checkpoint
from dynamics.models.functional import is_bridge
from dynamics.recipe import Recipe, RecipeError


def restored_copy(recipe: Recipe, checkpoint: Checkpoint) -> tuple[nn.Module, Optimizer, LRScheduler | None]:
    """A copy of the recipe's model, with optimizer and scheduler, in the checkpoint's state and modes.

    What the checkpoint holds nothing for begins as the recipe makes it.

    Raises:
        RecipeError: the checkpoint was recorded with another kind of optimizer.
        ValueError: the checkpoint is of another model.
    """
    model = copy.deepcopy(recipe.model)
    set_modes(model, checkpoint)
    optimizer = recipe.build_optimizer(model.parameters())
    scheduler = recipe.build_scheduler(optimizer)
    check_optimizer_kind(checkpoint, optimizer)
    checkpoint.restore(
        model,
        optimizer if checkpoint.optimizer and checkpoint.optimizer.groups else None,
        scheduler if checkpoint.scheduler else None,
    )
    return model, optimizer, scheduler


def set_modes(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put each submodule into the mode, train or eval, that was recorded for it, if one was."""
    if checkpoint.evaluating is not None:
        for name, module in model.named_modules():
            module.training = name not in checkpoint.evaluating


def assign_rates(recipe: Recipe, groups: Sequence[dict[str, Any]], step: int) -> None:
    """Give an optimizer's groups the recipe's learning rates for a step, where it says some.

    Raises:
        RecipeError: there is not one rate for each group.
    """
    if recipe.learning_rate is None:
        return
    rates = recipe.learning_rate(step)
    if isinstance(rates, Mapping):
        keys: list[tuple[Any, int]] = [(group.get("name"), i) for i, group in enumerate(groups)]
        by_group = [rates[key] for both in keys for key in both if key in rates]
    else:
        by_group = list(rates) if isinstance(rates, Sequence) else [rates] * len(groups)
    if len(by_group) != len(groups):
        raise RecipeError(
            f"learning_rate({step}) gives {rates!r}, and the optimizer has {len(groups)} groups: expected a "
            "number, a list of one for each, or a dict by their numbers or names."
        )
    for group, rate in zip(groups, by_group, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone().fill_(rate)
        else:
            group["lr"] = rate


def coasts(recipe: Recipe, parameter: Any, state: Collection[Any], step: int) -> bool:
    """Whether a parameter that the batch does not use has a gradient of zero, and not none.

    It has if it had one before, of which its optimizer's state tells; plain SGD, which keeps none, is taken to have
    moved every parameter in the first step.

    Args:
        parameter: itself, or its name.
        state: the optimizer's, by parameter or by name.
        step: that is taken.
    """
    return recipe.unused == "coast" and (parameter in state or (step > 0 and not state))


def held_names(model: nn.Module, optimizer: Optimizer) -> set[str]:
    """The names of the parameters that an optimizer holds."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held}


def check_optimizer_kind(checkpoint: Checkpoint, optimizer: Optimizer) -> None:
    """Raise a RecipeError if the recorded groups are those of another kind of optimizer, or missing mid-training.

    They are if each side has hyperparameters that the other lacks (AdamW has betas, SGD momentum). A
    setting that a later torch added, or a scheduler, is not taken for another kind.
    """
    if checkpoint.optimizer is None and checkpoint.step > 0:
        raise RecipeError(
            f"checkpoint {checkpoint.step} holds no optimizer state, so the step taken from it cannot be taken "
            "again. Give checkpoint.with_fresh_optimizer() to take one with a new optimizer instead."
        )
    if checkpoint.optimizer is None or not checkpoint.optimizer.groups:
        return
    recorded = {key for group in checkpoint.optimizer.groups for key in group} - {"params", "initial_lr"}
    expected = set(optimizer.defaults)
    if recorded - expected and expected - recorded:
        raise RecipeError(
            f"checkpoint {checkpoint.step} was recorded with another optimizer: its groups hold "
            f"{sorted(recorded - expected)} and lack {sorted(expected - recorded)}, which the recipe's "
            f"{type(optimizer).__name__} has. Give the recipe the run's own optimizer."
        )


def check_bridge(model: nn.Module, checkpoint: Checkpoint | None) -> None:
    """Raise a RecipeError where a checkpoint is given for a TransformerBridge."""
    if checkpoint is not None and is_bridge(model):
        raise RecipeError(
            "a TransformerBridge is measured as it stands: its parameters cannot be replaced during a call. Load "
            "the checkpoint into the Hugging Face model, bridge that, and give checkpoint=None; or give the "
            "Hugging Face model itself."
        )


def starting_point(recipe: Recipe, checkpoint: Checkpoint | None) -> Checkpoint:
    """The checkpoint on the model's device; without one, the recipe's model as it stands, optimizer new.

    Raises:
        RecipeError: the checkpoint is of another model.
    """
    if checkpoint is None:
        if recipe.optimizer is None:
            return Checkpoint.capture(recipe.model)
        optimizer = recipe.build_optimizer(recipe.model.parameters())
        return Checkpoint.capture(recipe.model, optimizer, recipe.build_scheduler(optimizer))
    for kind, recorded, present in (
        ("parameters", checkpoint.parameters, dict(recipe.model.named_parameters())),
        ("buffers", checkpoint.buffers, dict(recipe.model.named_buffers())),
    ):
        differing = _described(recorded) ^ _described(present)
        if differing:
            raise RecipeError(
                f"checkpoint {checkpoint.step} does not fit the recipe's model: their {kind} differ in "
                f"{', '.join(sorted({name for name, *_ in differing})[:5])} (name, shape or dtype)."
            )
    return checkpoint.to(next(recipe.model.parameters()).device)


def _described(tensors: Mapping[str, Tensor]) -> set[tuple[str, torch.Size, torch.dtype]]:
    return {(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
