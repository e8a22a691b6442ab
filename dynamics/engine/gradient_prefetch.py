"""Gradients of contrasts, those of several contrasts taken at once as soon as the first of them is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from checkpoints import Checkpoint
from dynamics.engine.memory import QUARTER, at_most
from dynamics.recipe import Contrast, Recipe
from dynamics.steps import StepGradient, gradient
from dynamics.steps.per_example import gradients_at_once, signature


class Ahead:
    """The gradients of the batches of contrasts, asked for in their order.

    Batches of one shape are taken together, as many as a quarter of the stacks' memory holds and the same ones in
    every call with the same contrasts; two by themselves, and all where the first ones cannot be taken together.
    What is found depends on a contrast's company to rounding.
    """

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, contrasts: Sequence[Contrast]) -> None:
        self._recipe, self._checkpoint = recipe, checkpoint
        self._waiting = list({id(b): b for c in contrasts for b in (c.base, c.source)}.values())
        self._taken: dict[int, StepGradient] = {}

    def gradient(self, batch: Any, where: str) -> StepGradient:
        """Gradient and buffers of one of the batches.

        Args:
            batch: the very object.
            where: how errors name it.

        Raises: as `gradient`.
        """
        if id(batch) in self._taken:
            return self._taken[id(batch)]
        self._taken = {}
        alone = gradient(self._recipe, self._checkpoint, batch, where)
        company = self._company(batch)
        if len(company) > 2:
            found = gradients_at_once(self._recipe, self._checkpoint, company, alone)
            if found is None:
                self._waiting = []
            else:
                self._taken = {id(b): step for b, step in zip(company, found, strict=True)}
        return self._taken.get(id(batch), alone)

    def _company(self, batch: Any) -> list[Any]:
        """A batch that waits and those like it among the next ones, which all wait no longer; nothing of others."""
        place = next((i for i, b in enumerate(self._waiting) if b is batch), None)
        if place is None:
            return []
        waiting = self._waiting[place:]
        most, kind = at_most(self._checkpoint.parameters.values(), QUARTER), signature(batch)
        company = [b for b in waiting[:most] if signature(b) == kind]
        chosen = {id(b) for b in company}
        self._waiting = [b for b in waiting if id(b) not in chosen]
        return company
