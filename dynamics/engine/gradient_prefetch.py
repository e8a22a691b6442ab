"""Gradient prefetch: the gradients of several contrasts by one `vmap(grad)`, as soon as the first is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from checkpoints import Checkpoint
from dynamics.engine.stack_memory import QUARTER, models_per_stack
from dynamics.recipe import Contrast, Recipe
from dynamics.steps import StepGradient, gradient
from dynamics.steps.fallbacks import ComputePaths, Fallback, in_halves
from dynamics.steps.per_example import signature, vmapped_gradients


class GradientPrefetch:
    """The gradients of the batches of contrasts, asked for in their order.

    Batches of one shape are taken together, as many as a quarter of the stacks' memory holds and the same ones in
    every call with the same contrasts; two by themselves, and all where the first ones cannot be taken together.
    What is found depends on a contrast's company to rounding.

    Args:
        recipe, checkpoint: as `gradient`.
        contrasts: whose base and source batches will be asked for.
        paths: where it is noted which way gradients were taken.
        alone: takes the gradient of one batch: None for `gradient`; `gradient_at` for those who can lose the
            checkpoint.
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        contrasts: Sequence[Contrast],
        paths: ComputePaths,
        alone: Callable[..., StepGradient] | None = None,
    ) -> None:
        self._recipe, self._checkpoint, self.paths, self._alone = recipe, checkpoint, paths, alone or gradient
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
        alone = self._alone(self._recipe, self._checkpoint, batch, where)
        company = self._company(batch)
        if len(company) <= 2:
            self.paths.took("gradients", "a backward pass for each batch")
            return alone

        def together(batches: Sequence[Any]) -> list[StepGradient]:
            first = alone if batches[0] is batch else self._alone(self._recipe, self._checkpoint, batches[0])
            return vmapped_gradients(self._recipe, self._checkpoint, batches, first)

        try:
            found = in_halves(together, company, self.paths, "gradients")
        except Fallback as error:
            self.paths.fell_back("gradients", "a backward pass for each batch", str(error))
            self._waiting = []
            return alone
        self.paths.took("gradients", "vmap(grad) over the batches of several contrasts")
        self._taken = {id(b): step for b, step in zip(company, found, strict=True)}
        return self._taken[id(batch)]

    def _company(self, batch: Any) -> list[Any]:
        """The batches to take with this one: those of its shape among the next that wait, itself first."""
        place = next((i for i, b in enumerate(self._waiting) if b is batch), None)
        if place is None:
            return []
        waiting = self._waiting[place:]
        most, kind = models_per_stack(self._checkpoint.parameters.values(), QUARTER), signature(batch)
        company = [b for b in waiting[:most] if signature(b) == kind]
        chosen = {id(b) for b in company}
        self._waiting = [b for b in waiting if id(b) not in chosen]
        return company
