"""Per-batch gradients of many batches of one shape in one backward pass: `vmap(grad)`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from checkpoints import Checkpoint
from checkpoints.rng import RngState
from dynamics.models.functional import attributes_restored, call_with, unfused_attention
from dynamics.recipe import Recipe
from dynamics.steps.fallbacks import Fallback, out_of_memory, reason
from dynamics.steps.gradients import StepGradient
from dynamics.steps.pullbacks import alike
from dynamics.trees import not_finite

Tensors = dict[str, Tensor]


def signature(batch: Any) -> tuple[Any, ...]:
    """What batches must share to be taken at once: structure, shapes, dtypes, devices, and what is no tensor."""
    leaves, structure = _pytree.tree_flatten(batch)
    return structure, *map(_kind, leaves)


def _kind(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return type(leaf), leaf if isinstance(leaf, str | int | float | None) else id(leaf)


def stacked_batches(
    batches: Sequence[Any],
) -> tuple[dict[int, Tensor], Callable[[Mapping[int, Tensor]], Any]]:
    """The tensors of batches of one `signature`, stacked, and what makes a batch of those of one."""
    leaves, structure = _pytree.tree_flatten(batches[0])
    columns = zip(*(_pytree.tree_leaves(batch) for batch in batches), strict=True)
    tensors = {i: torch.stack(c) for i, c in enumerate(columns) if isinstance(c[0], Tensor)}

    def batch_of(own: Mapping[int, Tensor]) -> Any:
        return _pytree.tree_unflatten([own.get(i, leaf) for i, leaf in enumerate(leaves)], structure)

    return tensors, batch_of


def vmapped_gradients(
    recipe: Recipe, checkpoint: Checkpoint, batches: Sequence[Any], first: StepGradient
) -> list[StepGradient]:
    """Per-batch gradients by `vmap(grad)`: what `gradient` gives for each of the batches, up to rounding.

    The first is compared with what it gives alone. Attributes that the model writes on the way are taken back.
    Memory: a gradient for each batch.

    Args:
        recipe, checkpoint: as `gradient`.
        batches: of one `signature`, in any pytree of torch's that holds tensors.
        first: what `gradient` gives for the first; what it has no gradient of, no other has.

    Raises:
        Fallback: this is not what each batch gives by itself: vmap cannot take the model or the loss (`.item()`,
            branches on values, an LSTM), a gradient is sparse, or something is not finite.
    """
    try:
        losses, gradients, buffers, rng = _together(recipe, checkpoint, batches, first)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise Fallback(reason(error)) from error  # an error of the user's own comes back from `gradient`
    if culprit := not_finite({"the loss": losses, **gradients}):
        raise Fallback(f"vmap(grad) found {culprit} not finite")
    steps = [
        StepGradient(losses[i], {n: None if g is None else g[i] for n, g in gradients.items()}, moved, rng)
        for i, moved in enumerate(buffers)
    ]
    if not _agree(steps[0], first):
        raise Fallback("vmap(grad) found another gradient than a backward pass of one batch")
    return steps


def _together(
    recipe: Recipe, checkpoint: Checkpoint, batches: Sequence[Any], first: StepGradient
) -> tuple[Tensor, dict[str, Tensor | None], list[Tensors], RngState]:
    """Losses [n], gradients [n, *shape], each batch's buffers, and the random number generators after it."""
    loss_of, n = recipe.require_loss(), len(batches)
    tensors, batch_of = stacked_batches(batches)
    parameters = {name: p.detach() for name, p in checkpoint.parameters.items()}
    trained = {name: parameters[name] for name, g in first.gradients.items() if g is not None}
    kept, moving = {}, {}
    for name, buffer in checkpoint.buffers.items():
        if torch.equal(buffer, first.buffers[name]):
            kept[name] = buffer.clone()
        else:
            moving[name] = buffer.expand(n, *buffer.shape).clone()

    def loss(
        own: Tensors, moving: Tensors, tensors: dict[int, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensors]]:
        buffers = {name: buffer.clone() for name, buffer in moving.items()}

        def passes(model: nn.Module, batch: Any) -> tuple[Tensor, tuple[Tensor, Tensors]]:
            found = loss_of(model, batch)
            return found, (found.detach(), {name: b for name, b in model.named_buffers() if name in moving})

        return call_with(passes, recipe.model, {**parameters, **own, **kept, **buffers}, batch_of(tensors))

    with (
        warnings.catch_warnings(),
        checkpoint.random_state(),
        attributes_restored(recipe.model),
        unfused_attention(),
    ):
        warnings.simplefilter("error")  # of loops that vmap falls back to
        of_each = torch.func.grad(loss, has_aux=True)
        found, (losses, moved) = torch.vmap(of_each, in_dims=(None, 0, 0), randomness="same")(
            trained, moving, tensors
        )
        rng = RngState.capture()
    buffers = [{**first.buffers, **{name: b[i] for name, b in moved.items()}} for i in range(n)]
    return losses, {name: found.get(name) for name in first.gradients}, buffers, rng


def _agree(ours: StepGradient, theirs: StepGradient) -> bool:
    """Whether two runs of one batch are one up to rounding."""
    counted = [name for name, b in theirs.buffers.items() if not b.is_floating_point()]
    rounded = [{n: b for n, b in run.buffers.items() if n not in counted} for run in (ours, theirs)]
    return (
        alike(ours.gradients, theirs.gradients)
        and alike(*rounded)
        and all(torch.equal(ours.buffers[name], theirs.buffers[name]) for name in counted)
    )
