"""patch_window: the gradient at a site exchanged at every step of a stretch of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any

import xarray as xr

from checkpoints import Checkpoint
from dynamics.engine.arguments import check_step_arguments
from dynamics.engine.exchanged_gradients import patched_gradients
from dynamics.engine.exclusive import exclusive
from dynamics.engine.gradient_prefetch import GradientPrefetch
from dynamics.engine.runs import Runs, run_contrasts
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check
from dynamics.steps import StepGradient, walk
from dynamics.steps.stacks import Stack, stack
from dynamics.steps.update import Steps


@exclusive
def patch_window(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    measured_after: Sequence[int] | None = None,
) -> xr.Dataset:
    """Train on through a window of batches with the source's gradient on one site at a time, at every step.

    At each step both gradients are taken at the current, patched parameters, exchanged at the site, clipped and
    stepped with the optimizer state, learning rate, buffers and random numbers carried along. One step is
    `patch_gradients`. Sequences that differ in their first batch alone give the **impulse response**: with
    β1 = 0.9 one step with stored moments shows a tenth of its gradient, the steps after it the rest.

    Args:
        recipe, checkpoint, measure: as `patch_gradients`.
        contrasts: whose `base` and `source` are sequences of batches of one length, the same for all contrasts.
            Where both hold the same batch object, one gradient serves for both.
        sites: as `patch_gradients`.
        measured_after: numbers of steps after which to measure, rising, 1 to the length; None for the end alone.

    Returns:
        As `patch_gradients`, with a dim `step` throughout: the step of the checkpoint that was measured.
        `coasted` takes every step with a zero gradient; `untouched` none.

    Raises:
        ValueError: sequences differ in length, or `measured_after` lies outside them. Otherwise as
            `patch_gradients`; an error names the step.
    """
    check_step_arguments("patch_window", recipe, checkpoint, contrasts, sites, measure)
    check(sites, recipe.model)
    for contrast in contrasts:
        for batches in (contrast.base, contrast.source):
            if not isinstance(batches, Sequence):
                raise ValueError(
                    f"a window's contrasts hold sequences of batches, such as [task.batch(4500), ...]; "
                    f"found a {type(batches).__name__}."
                )
    lengths = {n for c in contrasts for n in (len(c.base), len(c.source))}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(
            f"a window's contrasts hold sequences of batches of one length; these hold {sorted(lengths)}."
        )
    after = sorted(lengths) if measured_after is None else list(measured_after)
    if lengths and (after != sorted(set(after)) or not after or after[0] < 1 or after[-1] > max(lengths)):
        raise ValueError(f"measured_after={after}: give rising numbers of steps from 1 to {max(lengths)}.")
    patched_models = partial(_patched_models, after=after)
    return run_contrasts("patch_window", recipe, checkpoint, contrasts, sites, measure, patched_models, after)


StepOf = Callable[[Runs], StepGradient]


def _patched_models(window: Runs, sites: Sequence[Site], after: Sequence[int]) -> Iterator[Stack]:
    ways: list[StepOf] = [
        lambda runs: runs.zero_gradient,
        lambda runs: runs.base,
        lambda runs: runs.source,
        *(partial(_patched_at, site=site) for site in sites),
    ]
    untouched = stack([{**window.checkpoint.parameters, **window.checkpoint.buffers}])
    return chain(repeat(untouched, len(after)), *(_along(window, way, after) for way in ways))


def _patched_at(runs: Runs, site: Site) -> StepGradient:
    return next(patched_gradients(runs, [site]))


def _along(window: Runs, way: StepOf, after: Sequence[int]) -> Iterator[Stack]:
    """The model after each of the given numbers of steps taken in one way."""
    paths = window.steps.paths
    paths.took("steps", "the optimizer itself, step after step")
    batches: list[tuple[Any, Any]] = list(zip(window.contrast.base, window.contrast.source, strict=True))

    def step(state: Checkpoint) -> StepGradient:
        pair = Contrast(*batches[state.step - window.checkpoint.step])
        name = f"{window.name}, step {state.step}"
        prefetch = GradientPrefetch(window.recipe, state, [pair], paths)
        return way(Runs(Steps(window.recipe, state, paths), pair, name, prefetch))

    for number, state in enumerate(walk(window.recipe, window.checkpoint, step, after[-1]), start=1):
        if number in after:
            yield stack([{**state.parameters, **state.buffers}])
