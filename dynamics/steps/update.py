"""The optimizer's step from a checkpoint with given gradients: one, and many at once.

`step_from` is the slow and obvious way: the recipe's real optimizer on a copy of the model. `steps_from`
stacks the parameters of many steps and lets the same torch optimizer take them all, which is exact for
optimizers that work element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from checkpoints import Checkpoint
from dynamics.recipe import Recipe
from dynamics.steps.clipping import clipped
from dynamics.steps.states import check_kind, revived
from dynamics.trees import Gradients, squared_norm

ELEMENTWISE: tuple[type[Optimizer], ...] = (AdamW, Adam, SGD)
"""Optimizers whose step treats every element by itself, so that many steps can be stacked."""


def step_from(recipe: Recipe, checkpoint: Checkpoint, gradients: Gradients) -> dict[str, Tensor]:
    """Parameters after clipping the gradients and one step of the recipe's own optimizer.

    Args:
        recipe: model, optimizer and clipping; nothing of it is modified.
        checkpoint: state before the step.
        gradients: by parameter name, before clipping; None skips a parameter, zero lets it coast.
    """
    model, optimizer, _ = revived(recipe, checkpoint)
    for name, g in clipped(_of_optimizer(gradients, model, optimizer), recipe.clip).items():
        model.get_parameter(name).grad = g
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def steps_from(recipe: Recipe, checkpoint: Checkpoint, many: Sequence[Gradients]) -> list[dict[str, Tensor]]:
    """Parameters after each of several steps from the same checkpoint, in order.

    Equal to `step_from` one by one. AdamW, Adam and SGD take all steps at once on parameters stacked over
    the steps; other optimizers, and all where a gradient is sparse, take them one by one. Memory: about four
    copies of the model per step.
    """
    if not many:
        return []
    trained = {name: p.requires_grad for name, p in recipe.model.named_parameters()}
    dummies = {
        name: nn.Parameter(t.detach(), requires_grad=trained[name])
        for name, t in checkpoint.parameters.items()
    }
    template = recipe.build_optimizer(dummies.values())
    recipe.build_scheduler(template)
    check_kind(checkpoint, template)
    sparse = any(g is not None and g.is_sparse for gradients in many for g in gradients.values())
    if sparse or type(template) not in ELEMENTWISE:
        return [step_from(recipe, checkpoint, gradients) for gradients in many]
    names = {id(p): name for name, p in dummies.items()}
    groups = _groups(checkpoint, template, names)
    held = {name for group in groups for name in group["params"]}
    remembered = _remembered(squared_norm)
    rows = [clipped({n: g for n, g in gs.items() if n in held}, recipe.clip, remembered) for gs in many]
    results: list[dict[str, Tensor]] = [{} for _ in rows]
    for skipped in {_skipped(row) for row in rows}:
        members = [i for i, row in enumerate(rows) if _skipped(row) == skipped]
        after = _stacked_step(type(template), groups, checkpoint, [rows[i] for i in members], skipped)
        for place, i in enumerate(members):
            results[i] = {
                name: after[name][place] if name in after else tensor.detach().clone()
                for name, tensor in checkpoint.parameters.items()
            }
    return results


def _stacked_step(
    kind: type[Optimizer],
    groups: Sequence[Mapping[str, Any]],
    checkpoint: Checkpoint,
    rows: Sequence[Mapping[str, Tensor | None]],
    skipped: frozenset[str],
) -> dict[str, Tensor]:
    """One step of `kind` on parameters stacked over the rows: {name: [n_rows, ...]} of those it changes."""
    n = len(rows)

    def repeat(t: Tensor) -> Tensor:
        return t.detach().unsqueeze(0).expand(n, *t.shape).clone()

    stacked: dict[str, nn.Parameter] = {}
    stacked_groups = []
    for group in groups:
        members = [name for name in group["params"] if name not in skipped]
        for name in members:
            stacked[name] = nn.Parameter(repeat(checkpoint.parameters[name]))
            stacked[name].grad = torch.stack([_present(row[name]) for row in rows])
        if members:
            stacked_groups.append({**group, "params": [stacked[name] for name in members]})
    if not stacked_groups:
        return {}
    optimizer = kind(stacked_groups)  # type: ignore[call-arg]
    recorded = checkpoint.optimizer.state if checkpoint.optimizer else {}
    for name, parameter in stacked.items():
        if name in recorded:
            shape = checkpoint.parameters[name].shape
            optimizer.state[parameter] = {
                key: _state_value(value, key, shape, repeat) for key, value in recorded[name].items()
            }
    optimizer.step()
    return {name: p.detach() for name, p in stacked.items()}


def _state_value(value: Any, key: str, shape: torch.Size, repeat: Callable[[Tensor], Tensor]) -> Any:
    """Moments are stacked like their parameter; step counts are shared by all rows."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if key == "step" or value.shape != shape else repeat(value)


def _groups(checkpoint: Checkpoint, template: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Parameter groups by name: the checkpoint's own, or the recipe's where it holds none."""
    if checkpoint.optimizer is not None:
        return [{**template.defaults, **group} for group in checkpoint.optimizer.groups]
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in template.param_groups]


def _of_optimizer(gradients: Gradients, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor | None]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: gradients[name] for name, p in model.named_parameters() if id(p) in held}


def _skipped(row: Mapping[str, Tensor | None]) -> frozenset[str]:
    return frozenset(name for name, g in row.items() if g is None)


def _present(g: Tensor | None) -> Tensor:
    assert g is not None, "rows are grouped by the parameters they skip"
    return g


def _remembered(function: Callable[[Tensor | None], float]) -> Callable[[Tensor | None], float]:
    """The function, computed once per tensor object while this call lasts."""
    known: dict[int, tuple[Tensor | None, float]] = {}

    def lookup(tensor: Tensor | None) -> float:
        if id(tensor) not in known:
            known[id(tensor)] = tensor, function(tensor)
        return known[id(tensor)][1]

    return lookup
