"""The gradient of one training step at a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import Checkpoint
from checkpoints.rng import RngState
from dynamics.models.functional import call_with
from dynamics.recipe import Recipe, RecipeError
from dynamics.steps.states import coasts
from dynamics.steps.taps import Taps
from dynamics.trees import described, not_finite


class NonFiniteGradient(ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names the batch and the parameter."""


@dataclass(frozen=True)
class StepGradient:
    """What one backward pass leaves behind, before clipping.

    Attributes:
        loss: the scalar loss.
        gradients: by parameter name; None where the loss does not depend on a parameter, which torch's
            optimizers then skip, or zero where the recipe lets it coast; sparse, each row once, where a module
            makes them so.
        buffers: the model's buffers after the forward pass (batch statistics move there).
        rng: the random number generators after the pass.
    """

    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    rng: RngState

    def __repr__(self) -> str:
        return described(self)


_NO_TAPS = Taps((), lambda name, key, activation: activation)


def gradient(
    recipe: Recipe, checkpoint: Checkpoint, batch: Any, where: str = "the batch", taps: Taps = _NO_TAPS
) -> StepGradient:
    """Loss and gradient of a batch at a checkpoint, with the checkpoint's random numbers.

    Args:
        recipe: model and loss; the model is left as it is and gives its train or eval mode.
        checkpoint: parameters, buffers and random state.
        batch: what the loss eats.
        where: how errors name the batch.
        taps: what is read or replaced inside the model on the way.

    Raises:
        NonFiniteGradient: the loss or a gradient is NaN or infinite.
        RecipeError: the forward pass writes into a parameter.
    """
    copies = {name: tensor.detach().clone() for name, tensor in checkpoint.parameters.items()}
    return gradient_at(recipe, replace(checkpoint, parameters=copies), batch, where, taps)


def gradient_at(
    recipe: Recipe, checkpoint: Checkpoint, batch: Any, where: str = "the batch", taps: Taps = _NO_TAPS
) -> StepGradient:
    """As `gradient`, from the checkpoint's own parameters and not from copies of them: for those who can lose them
    where the forward pass writes into one."""
    loss_of = recipe.require_loss()
    trained = {name for name, p in recipe.model.named_parameters() if p.requires_grad}
    parameters = {
        name: tensor.detach().requires_grad_(name in trained)
        for name, tensor in checkpoint.parameters.items()
    }
    unwritten = {name: p._version for name, p in parameters.items()}
    buffers = {name: tensor.detach().clone() for name, tensor in checkpoint.buffers.items()}
    inputs = {name: p for name, p in parameters.items() if p.requires_grad}

    def passes(model: nn.Module, batch: Any) -> tuple[Tensor, Sequence[Tensor | None], dict[str, Tensor]]:
        """Forward and backward with the checkpoint's tensors in place: what is recomputed uses them too."""
        loss = loss_of(model, batch)
        taps.forward_is_over()
        after = {name: buffer.detach() for name, buffer in model.named_buffers()}
        leaves = [*inputs.values(), *taps.leaves]
        found = torch.autograd.grad(loss, leaves, retain_graph=taps.keeps_graph, allow_unused=True)
        return loss, found, after

    with checkpoint.random_state(), torch.enable_grad(), taps.attached(recipe.model):
        loss, found, buffers = call_with(passes, recipe.model, {**parameters, **buffers}, batch)
        rng = RngState.capture()
    if taps.keeps_graph:
        taps.parameters.update(inputs)
    if written := [name for name, p in parameters.items() if p._version != unwritten[name]]:
        raise RecipeError(
            f"the forward pass writes into {', '.join(written)} in place (nn.Embedding(max_norm=) does), so a step "
            "does not begin at the checkpoint. Such a model cannot be replayed."
        )
    if not bool(torch.isfinite(loss)):
        raise NonFiniteGradient(f"The loss of {where} at step {checkpoint.step} is {loss.item()}.")
    gradients: dict[str, Tensor | None] = dict.fromkeys(parameters)
    moments = checkpoint.optimizer.state if checkpoint.optimizer else {}
    for name, g in zip(inputs, found, strict=False):
        if g is None and coasts(recipe, name, moments, checkpoint.step):
            gradients[name] = torch.zeros_like(parameters[name])
        else:
            gradients[name] = g.coalesce() if g is not None and g.is_sparse else g
    if culprit := not_finite(gradients):
        raise NonFiniteGradient(
            f"The gradient of {culprit} for {where} at step {checkpoint.step} is not finite."
        )
    return StepGradient(loss.detach(), gradients, buffers, rng)
