"""The optimizer's step from a checkpoint with given gradients: one, and many at once.

`step_from` is the slow and obvious way: the recipe's real optimizer on a copy of the model. `Steps` takes many
steps of AdamW, Adam or SGD in one pass over the parameters, which is exact up to rounding since these work
element by element, and every other step the obvious way.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoints import Checkpoint
from dynamics.recipe import ByNorm, ByValue, Recipe
from dynamics.steps.clipping import clipped, coefficient, counted
from dynamics.steps.elementwise_optimizers import step_into, unsupported
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.flat_parameters import FlatParameters, flat_parameters
from dynamics.steps.stacks import Stack, Workspace, stack
from dynamics.steps.states import assign_rates, check_optimizer_kind, held_names, restored_copy
from dynamics.trees import Gradients, squared_norms


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
        space = space or Workspace()
        rules = self._rules
        sparse = any(g is not None and g.is_sparse for gs in many for g in gs.values())
        if isinstance(rules, str) or sparse:
            why = rules if isinstance(rules, str) else "gradients are sparse"
            self.paths.fell_back("steps", "the optimizer itself, one step at a time", why)
            return stack([step_from(self.recipe, self.checkpoint, gradients) for gradients in many])
        self.paths.took("steps", "all at once, element by element")
        scales = self._scales(many)
        shared, stacked = dict(self.checkpoint.parameters), {}
        for flat in rules:
            rows = [[gradients[name] for name in flat.parts] for gradients in many]
            present = [[g is not None for g in row] for row in rows]
            if not any(map(any, present)):
                continue
            whole = all(any(row) == all(row) for row in present)
            for part in (flat,) if whole else flat.one_by_one:
                after = self._stepped(part, many, scales, space)
                for name, moved in part.apart(after) if after is not None else ():
                    del shared[name]
                    if len(moved) == 1:
                        shared[name] = moved[0]
                    else:
                        stacked[name] = moved
        return Stack(len(many), shared, stacked)

    def _stepped(
        self, flat: FlatParameters, many: Sequence[Gradients], scales: Sequence[float], space: Workspace
    ) -> Tensor | None:
        """Some parameters after each step, [n, size]; [1, size] where all steps move them alike, None where none
        does. Each gradient has all of them or none."""
        rows = [[gradients[name] for name in flat.parts] for gradients in many]
        present = [i for i, row in enumerate(rows) if row[0] is not None]
        if not present:
            return None
        found = [[g for g in rows[i] if g is not None] for i in present]
        alike = all(g is first for row in found[1:] for g, first in zip(row, found[0], strict=True))
        gradients = flat.gradients(found[:1] if alike else found, space)
        if isinstance(self.recipe.clip, ByValue):
            gradients = gradients.clamp(-self.recipe.clip.limit, self.recipe.clip.limit)
        one = alike and len(present) == len(many) and len(set(scales)) == 1
        of_rows = present[:1] if one else present
        scale = flat.theta.new_tensor([scales[i] for i in of_rows])
        n = 1 if one else len(many)
        after = space.empty(next(iter(flat.parts)), flat.theta, n, len(flat.theta))
        into = after[of_rows[0] : of_rows[-1] + 1]
        if len(of_rows) < n:
            after[:] = flat.theta
        if len(of_rows) == len(into):
            step_into(into, flat.moved, flat.begin, gradients, scale, space)
        else:
            apart = after.new_empty(len(of_rows), len(flat.theta))
            step_into(apart, flat.moved, flat.begin, gradients, scale, space)
            after[of_rows] = apart
        return after

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
        """Σ g² by id, added up once as long as a tensor lives and is not written into."""
        known = {i: self._norms[i] for i, g in gradients.items() if i in self._norms}
        found = {
            i: n for i, (alive, v, n) in known.items() if alive() is (g := gradients[i]) and v == g._version
        }
        new = [g for i, g in gradients.items() if i not in found]
        for g, norm in zip(new, squared_norms(new), strict=True):
            self._norms[id(g)] = weakref.ref(g), g._version, norm
            found[id(g)] = norm
        return found


def _groups(checkpoint: Checkpoint, template: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Parameter groups by name: the checkpoint's own, or the recipe's where it holds none."""
    if checkpoint.optimizer is not None and checkpoint.optimizer.groups:
        return [{**template.defaults, **group} for group in checkpoint.optimizer.groups]
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in template.param_groups]
