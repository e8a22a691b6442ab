"""Many steps on end, each with a gradient of the caller's making."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from checkpoints import Checkpoint
from dynamics.recipe import Recipe
from dynamics.steps.clipping import clipped
from dynamics.steps.gradients import StepGradient
from dynamics.steps.states import assign_rates, coasts, held_names, restored_copy


def walk(
    recipe: Recipe, checkpoint: Checkpoint, gradient_at: Callable[[Checkpoint], StepGradient], n_steps: int
) -> Iterator[Checkpoint]:
    """Take steps with the recipe's own optimizer and scheduler, carrying everything along.

    Args:
        recipe: nothing of it is modified.
        checkpoint: where to begin.
        gradient_at: the step to take from a state, before clipping; parameters whose gradient is None are
            skipped. Its buffers and random numbers are those the next state has.
        n_steps: how many.

    Yields:
        The state after each step. Its parameters are the walk's own and move on with it; its optimizer state
        is the first one's: the walk carries the living optimizer.
    """
    model, optimizer, scheduler = restored_copy(recipe, checkpoint)
    parameters, held = dict(model.named_parameters()), held_names(model, optimizer)
    state = replace(checkpoint, parameters={n: p.detach() for n, p in parameters.items()})
    for _ in range(n_steps):
        step = gradient_at(state)
        assign_rates(recipe, optimizer.param_groups, state.step)
        for name, g in clipped(step.gradients, recipe.clip, held).items():
            unused = g is None and coasts(recipe, parameters[name], optimizer.state, state.step)
            parameters[name].grad = torch.zeros_like(parameters[name]) if unused else g
        with torch.no_grad():
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        state = replace(state, step=state.step + 1, buffers=step.buffers, rng=step.rng)
        yield state
