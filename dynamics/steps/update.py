"""The optimizer's step from a checkpoint with given gradients: one, and many at once.

`step_from` is the slow and obvious way: the recipe's real optimizer on a copy of the model. `Steps` takes many
steps of AdamW, Adam or SGD in one pass over the parameters, which is exact up to rounding since these work
element by element, and every other step the obvious way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dynamics.steps.elementwise_optimizers import step_blocks, unsupported
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.flat_parameters import FlatParameters, flat_parameters
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
        scales = self._scales(many)
        shared, stacked = dict(self.checkpoint.parameters), {}
        clip = self.recipe.clip
        limit = clip.limit if isinstance(clip, ByValue) else None
        blocks: list[Callable[[], None]] = []
        scattered: list[tuple[Tensor, list[int], Tensor]] = []
        for flat, present, ours in _moving(rules, many):
            theta = flat.theta
            alike = all(g is first for row in ours[1:] for g, first in zip(row, ours[0], strict=True))
            apart = ours[:1] if alike else ours
            scale = None
            one = alike and len(present) == len(many) and len(set(scales)) == 1
            if any(scales[i] != 1 for i in present):
                of_steps = scales[:1] if one else [scales[i] for i in present]
                scale = torch.tensor(of_steps, dtype=theta.dtype, device=theta.device)
            n = 1 if one else len(many)
            after = space.empty(next(iter(flat.parts)), theta, n, len(theta))
            rows = slice(0, 1) if one else slice(present[0], present[-1] + 1)
            into = after[rows]
            if one or len(present) == len(into):
                after[: rows.start], after[rows.stop :] = theta, theta
            else:
                after[:] = theta
                into = after.new_empty(len(present), len(theta))
                scattered.append((after, present, into))
            blocks += step_blocks(into, flat.moved, flat.begin, apart, limit, scale, space)
            for name, moved in flat.apart(after):
                del shared[name]
                if one:
                    shared[name] = moved[0]
                else:
                    stacked[name] = moved
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
        if any((one[name] is None) != (other[name] is None) for flat in rules for name in flat.parts):
            return False
        if not isinstance(clip, ByNorm):
            return True
        longest = sum(self._squared_norms([one, other]))
        return coefficient(longest, clip.max_norm) == 1

    @cached_property
    def _rules(self) -> list[FlatParameters] | str:
        """How the optimizer's parameters move; or why one of them needs the real optimizer."""
        trained = {name: p.requires_grad for name, p in self.recipe.model.named_parameters()}
        dummies = {
            name: nn.Parameter(t.detach(), requires_grad=trained[name])
            for name, t in self.checkpoint.parameters.items()
        }
        template = self.recipe.build_optimizer(dummies.values())
        self.recipe.build_scheduler(template)
        check_optimizer_kind(self.checkpoint, template)
        recorded = self.checkpoint.optimizer.state if self.checkpoint.optimizer else {}
        groups = _groups(self.checkpoint, template, {id(p): name for name, p in dummies.items()})
        assign_rates(self.recipe, groups, self.checkpoint.step)
        kind = type(template)
        rules: list[FlatParameters] = []
        for group in groups:
            parameters = {name: self.checkpoint.parameters[name] for name in group["params"]}
            for name, theta in parameters.items():
                if why := unsupported(kind, group, recorded.get(name, {}), theta):
                    return why
            rules += flat_parameters(kind, group, recorded, parameters)
        return rules

    def _scales(self, many: Sequence[Gradients]) -> list[float]:
        """What clipping by norm multiplies each gradient by."""
        clip = self.recipe.clip
        if not isinstance(clip, ByNorm):
            return [1.0] * len(many)
        return [coefficient(total, clip.max_norm) for total in self._squared_norms(many)]

    def _squared_norms(self, many: Sequence[Gradients]) -> list[float]:
        """Σ g² of each gradient over the parameters whose norm is taken, in their order."""
        clip, rules = self.recipe.clip, self._rules
        assert isinstance(clip, ByNorm), f"no norm is taken by {clip!r}"
        assert not isinstance(rules, str), "steps are taken one at a time"
        held = {name for flat in rules for name in flat.parts}
        each = [[g for g in counted(gs, clip, held) if g is not None] for gs in many]
        norms = self._norms_of({id(g): g for gs in each for g in gs})
        return [sum(norms[id(g)] for g in gs) for gs in each]

    def _norms_of(self, gradients: Mapping[int, Tensor]) -> dict[int, float]:
        """Σ g² by id, added up once as long as a tensor lives and is not written into, with one transfer from the
        device."""
        found = {}
        for i, gradient in gradients.items():
            alive, version, norm = self._norms.get(i, (None, 0, 0.0))
            if alive is not None and alive() is gradient and version == gradient._version:
                found[i] = norm
        new = [g for i, g in gradients.items() if i not in found]
        sums = spread(squares, new)
        numbers = iter(torch.cat([s.to(sums[0].device) for s in sums]).tolist() if sums else ())
        for gradient, of_blocks in zip(new, sums, strict=True):
            norm = sum(islice(numbers, len(of_blocks)))
            self._norms[id(gradient)] = weakref.ref(gradient), gradient._version, norm
            found[id(gradient)] = norm
        return found


def _moving(
    rules: Sequence[FlatParameters], many: Sequence[Gradients]
) -> Iterator[tuple[FlatParameters, list[int], list[list[Tensor]]]]:
    """What moves: parameters side by side as far as each step moves all of them or none, the numbers of the steps
    that do, and for each of these their gradients."""
    for flat in rules:
        absent = [[gradients[name] is None for name in flat.parts] for gradients in many]
        together = all(any(row) == all(row) for row in absent)
        for part in (flat,) if together else flat.one_by_one:
            rows = [[g for name in part.parts if (g := gradients[name]) is not None] for gradients in many]
            if present := [i for i, row in enumerate(rows) if row]:
                yield part, present, [rows[i] for i in present]


def _groups(checkpoint: Checkpoint, template: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Parameter groups by name: the checkpoint's own, or the recipe's where it holds none."""
    if checkpoint.optimizer is not None and checkpoint.optimizer.groups:
        return [{**template.defaults, **group} for group in checkpoint.optimizer.groups]
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in template.param_groups]
