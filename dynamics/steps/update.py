"""The optimizer's step from a checkpoint with given gradients: one, and many at once.

`step_from` is the slow and obvious way: the recipe's real optimizer on a copy of the model. `Steps` takes many
steps of AdamW, Adam or SGD in one pass over the parameters, which is exact up to rounding since these work
element by element, and every other step the obvious way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoints import Checkpoint
from dynamics.recipe import ByNorm, ByValue, Recipe
from dynamics.steps.clipping import clipped, coefficient, counted
from dynamics.steps.elementwise_optimizers import Moved, rule, step_blocks
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.stacks import Stack, Workspace, stack
from dynamics.steps.states import assign_rates, check_optimizer_kind, held_names, restored_copy
from dynamics.steps.worker_threads import Spread, spread
from dynamics.trees import Gradients, squares


def step_from(recipe: Recipe, checkpoint: Checkpoint, gradients: Gradients) -> dict[str, Tensor]:
    """Parameters after clipping the gradients and one step of the recipe's own optimizer.

    Args:
        recipe: model, optimizer and clipping; nothing of it is modified.
        checkpoint: state before the step.
        gradients: by parameter name, before clipping; None skips a parameter, zero lets it coast.
    """
    model, optimizer, _ = restored_copy(recipe, checkpoint)
    assign_rates(recipe, optimizer.param_groups, checkpoint.step)
    for name, g in clipped(gradients, recipe.clip, held_names(model, optimizer)).items():
        model.get_parameter(name).grad = g
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def steps_from(recipe: Recipe, checkpoint: Checkpoint, many: Sequence[Gradients]) -> list[dict[str, Tensor]]:
    """Parameters after each of several steps from the same checkpoint, in order.

    Equal to `step_from` one by one, up to rounding. AdamW, Adam and SGD take all steps at once; other optimizers
    and settings, and all where a gradient is sparse, take them one by one.
    """
    return list(Steps(recipe, checkpoint).take(many)) if many else []


@dataclass(frozen=True)
class Steps:
    """Steps from one checkpoint; what does not depend on the gradient is prepared once.

    Attributes:
        recipe: model, optimizer and clipping; nothing of it is modified.
        checkpoint: state before the steps.
        paths: where it is noted which way steps were taken.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    paths: ComputePaths = field(default_factory=ComputePaths)
    _norms: dict[int, tuple[weakref.ref[Tensor], int, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def take(self, many: Sequence[Gradients], space: Workspace | None = None) -> Stack:
        """The parameters after a step with each of the gradients, of which there is at least one.

        Gradients that are one object in all steps are read once. Parameters that no step moves are shared, the
        checkpoint's own. Memory: a copy of each parameter that moves for every step, in the workspace if one is
        given: the stack then holds until it is used again.
        """
        return self.begin(many, space)()

    def begin(self, many: Sequence[Gradients], space: Workspace | None = None) -> Callable[[], Stack]:
        """Have worker threads begin on `take`: the function returned waits for them and gives the stack.

        Until then the gradients and the workspace belong to them.
        """
        space = space or Workspace()
        rules = self._rules
        sparse = any(g is not None and g.is_sparse for gs in many for g in gs.values())
        if isinstance(rules, str) or sparse:
            why = rules if isinstance(rules, str) else "gradients are sparse"
            self.paths.fell_back("steps", "the optimizer itself, one step at a time", why)
            one_by_one = stack([step_from(self.recipe, self.checkpoint, gradients) for gradients in many])
            return lambda: one_by_one
        self.paths.took("steps", "all at once, element by element")
        scales = self._scales(many, rules)
        shared, stacked = dict(self.checkpoint.parameters), {}
        clip = self.recipe.clip
        limit = clip.limit if isinstance(clip, ByValue) else None
        blocks: list[Callable[[], None]] = []
        scattered: list[tuple[Tensor, list[int], Tensor]] = []
        for name, moved in rules.items():
            found = [gradients[name] for gradients in many]
            present = [i for i, g in enumerate(found) if g is not None]
            if not present:
                continue
            theta = shared.pop(name).detach()
            ours = [g for g in found if g is not None]
            alike = all(g is ours[0] for g in ours)
            apart = ours[:1] if alike else ours
            scale = None
            one = alike and len(present) == len(many) and len(set(scales)) == 1
            if any(scales[i] != 1 for i in present):
                of_steps = scales[:1] if one else [scales[i] for i in present]
                scale = torch.tensor(of_steps, dtype=theta.dtype, device=theta.device)
            if one:
                after = space.empty(name, theta, 1, *theta.shape)
                blocks += step_blocks(after, moved, apart, limit, scale, space)
                shared[name] = after[0]
                continue
            after = space.empty(name, theta, len(many), *theta.shape)
            rows = slice(present[0], present[-1] + 1)
            if len(present) == rows.stop - rows.start:
                blocks += step_blocks(after[rows], moved, apart, limit, scale, space)
                after[: rows.start], after[rows.stop :] = theta, theta
            else:
                after[:] = theta
                found_rows = after.new_empty(len(present), *theta.shape)
                blocks += step_blocks(found_rows, moved, apart, limit, scale, space)
                scattered.append((after, present, found_rows))
            stacked[name] = after
        n, begun = len(many), Spread(lambda block: block(), blocks)

        def finish() -> Stack:
            begun.join()
            for after, present, rows in scattered:
                after[present] = rows
            return Stack(n, shared, stacked)

        return finish

    def separable(self, one: Gradients, other: Gradients) -> bool:
        """Whether the step with any mixture of two gradients has each element from one of their two steps.

        So it is where the optimizer works element by element, both gradients are of the same parameters, and no
        mixture can be so long that clipping scales it: N² is at most the sum of both.
        """
        rules, clip = self._rules, self.recipe.clip
        sparse = any(g is not None and g.is_sparse for gs in (one, other) for g in gs.values())
        if isinstance(rules, str) or sparse:
            return False
        if any((one[name] is None) != (other[name] is None) for name in rules):
            return False
        if not isinstance(clip, ByNorm):
            return True
        both = [g for gs in (one, other) for g in counted(gs, clip, rules)]
        self._take_norms(both)
        longest = sum(map(self._norm, both))
        return coefficient(longest, clip.max_norm) == 1

    @cached_property
    def _rules(self) -> dict[str, Moved] | str:
        """How each of the optimizer's parameters moves; or why one of them needs the real optimizer."""
        trained = {name: p.requires_grad for name, p in self.recipe.model.named_parameters()}
        dummies = {
            name: nn.Parameter(t.detach(), requires_grad=trained[name])
            for name, t in self.checkpoint.parameters.items()
        }
        template = self.recipe.build_optimizer(dummies.values())
        self.recipe.build_scheduler(template)
        check_optimizer_kind(self.checkpoint, template)
        recorded = self.checkpoint.optimizer.state if self.checkpoint.optimizer else {}
        rules: dict[str, Moved] = {}
        groups = _groups(self.checkpoint, template, {id(p): name for name, p in dummies.items()})
        assign_rates(self.recipe, groups, self.checkpoint.step)
        for group in groups:
            for name in group["params"]:
                moved = rule(type(template), group, recorded.get(name, {}), self.checkpoint.parameters[name])
                if isinstance(moved, str):
                    return moved
                rules[name] = moved
        return rules

    def _scales(self, many: Sequence[Gradients], held: Mapping[str, Moved]) -> list[float]:
        """What clipping by norm multiplies each gradient by."""
        clip = self.recipe.clip
        if not isinstance(clip, ByNorm):
            return [1.0] * len(many)
        self._take_norms(g for gradients in many for g in counted(gradients, clip, held))
        totals = (sum(map(self._norm, counted(gradients, clip, held))) for gradients in many)
        return [coefficient(total, clip.max_norm) for total in totals]

    def _norm(self, gradient: Tensor | None) -> float:
        """Σ g², added up once as long as the tensor lives and is not written into."""
        if gradient is None:
            return 0.0
        if not self._has_norm(gradient):
            self._take_norms([gradient])
        return self._norms[id(gradient)][2]

    def _has_norm(self, gradient: Tensor) -> bool:
        alive, version, _ = self._norms.get(id(gradient), (None, 0, 0.0))
        return alive is not None and alive() is gradient and version == gradient._version

    def _take_norms(self, gradients: Iterable[Tensor | None]) -> None:
        """Add up those that are not known, with one transfer from the device."""
        new = list({id(g): g for g in gradients if g is not None and not self._has_norm(g)}.values())
        sums = spread(squares, new)
        numbers = iter(torch.cat([s.to(sums[0].device) for s in sums]).tolist() if sums else ())
        for gradient, of_blocks in zip(new, sums, strict=True):
            norm = sum(islice(numbers, len(of_blocks)))
            self._norms[id(gradient)] = weakref.ref(gradient), gradient._version, norm


def _groups(checkpoint: Checkpoint, template: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Parameter groups by name: the checkpoint's own, or the recipe's where it holds none."""
    if checkpoint.optimizer is not None and checkpoint.optimizer.groups:
        return [{**template.defaults, **group} for group in checkpoint.optimizer.groups]
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in template.param_groups]
