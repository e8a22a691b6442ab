"""Two runs of a contrast: their gradients, the reference models, and one verb run over contrasts and sites."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints import Checkpoint
from dynamics import measures, results
from dynamics.engine.arguments import check_sources, named, naming
from dynamics.engine.gradient_prefetch import GradientPrefetch
from dynamics.engine.measuring import CachedPrefixes, Measuring
from dynamics.engine.progress import progress_bar
from dynamics.engine.stack_memory import HALF, chunks, models_per_stack, trim_freed_memory
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import Labels
from dynamics.sites import Site
from dynamics.steps import StepGradient
from dynamics.steps.factors import Factors, factors
from dynamics.steps.fallbacks import ComputePaths, out_of_memory, reason
from dynamics.steps.stacks import Stack, Workspace, stack
from dynamics.steps.states import starting_point
from dynamics.steps.update import Steps
from dynamics.steps.worker_threads import has_workers, worker_threads

REFERENCE_ORDER = ("untouched", "coasted", "base", "source")
"""What every patched step is compared with, in the order in which the models are made: where they are large, no
more than two of them are held, and two gradients."""

_BASE = REFERENCE_ORDER.index("base")


@dataclass(frozen=True)
class Runs:
    """The two runs of one contrast at one checkpoint.

    Attributes:
        steps: how steps are taken, and from where.
        contrast: on which batches.
        name: how errors name the contrast.
        prefetch: where the gradients come from.
        space: memory for stacks that are measured one after another.
        known: gradients that were taken already, by "base" and "source".
    """

    steps: Steps
    contrast: Contrast
    name: str
    prefetch: GradientPrefetch
    space: Workspace = field(default_factory=Workspace)
    known: dict[str, StepGradient] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """How a step is taken."""
        return self.steps.recipe

    @property
    def checkpoint(self) -> Checkpoint:
        """The state before the step."""
        return self.steps.checkpoint

    @property
    def batch_names(self) -> tuple[str, str]:
        """How errors name the base and the source batch."""
        return f"the base batch of {self.name}", f"the source batch of {self.name}"

    @cached_property
    def base(self) -> StepGradient:
        """Gradient and buffers of the base batch, before clipping."""
        return self.known.get("base") or self.prefetch.gradient(self.contrast.base, self.batch_names[0])

    @cached_property
    def source(self) -> StepGradient:
        """Gradient and buffers of the source batch, before clipping; the base's own where the batches are one."""
        if self.contrast.source is self.contrast.base:
            return self.base
        return self.known.get("source") or self.prefetch.gradient(self.contrast.source, self.batch_names[1])

    @cached_property
    def no_gradient(self) -> StepGradient:
        """A gradient of None for every parameter: nothing moves."""
        return replace(
            self.base,
            gradients=dict.fromkeys(self.checkpoint.parameters),
            buffers=dict(self.checkpoint.buffers),
        )

    @property
    def zero_gradient(self) -> StepGradient:
        """The base gradient set to zero: momentum and decay alone move what it would have moved."""
        return replace(self.base, gradients={n: _zero(g) for n, g in self.base.gradients.items()})

    def release(self, names: Iterable[str] = ("base", "source")) -> None:
        """Release the gradient of the base or the source batch, or of both: each is as large as the model."""
        for name in names:
            self.known.pop(name, None)
            self.__dict__.pop(name, None)

    @cached_property
    def base_factors(self) -> Factors:
        """The factors x and δ of the base batch's gradient."""
        return factors(self.recipe, self.checkpoint, self.contrast.base, self.batch_names[0])

    @cached_property
    def source_factors(self) -> Factors:
        """The factors x and δ of the source batch's gradient."""
        return factors(self.recipe, self.checkpoint, self.contrast.source, self.batch_names[1])


def _zero(gradient: Tensor | None) -> Tensor | None:
    """Zero where there is a gradient, one number for all elements; of a sparse one, in the rows it stores."""
    if gradient is None or gradient.is_sparse:
        return None if gradient is None else gradient * 0
    return gradient.new_zeros(()).expand_as(gradient)


@dataclass(frozen=True)
class Variants:
    """Variants of a base model: they share what they do not change; the first of them is the base model itself.

    Attributes:
        models: the base model and its variants.
        prefixes: cached prefixes of the base model's forward pass on each probe; None where passes are not resumed.
    """

    models: Stack
    prefixes: CachedPrefixes | None


PatchedModels = Callable[[Runs, Sequence[Site]], Iterable[Stack | Variants]]
"""Models after a step, in stacks: all their parameters and buffers by name."""


def run_contrasts(
    verb: str,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    patched_sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    patched_models: PatchedModels,
    measured_after: Sequence[int] | None = None,
) -> xr.Dataset:
    """Run one patching verb over contrasts and sites and label what is measured.

    Contrasts that share their base and source batch are run once and measured on each one's probe.

    Args:
        verb: its name, for provenance and the progress bar.
        recipe, checkpoint, contrasts, patched_sites, measure: as the verb was called.
        patched_models: yields the models of `REFERENCE_ORDER`, then that of the step patched at each site, in
            order; each of them once for every entry of `measured_after`.
        measured_after: numbers of steps, which become the dim `step`; None where a single step is taken.

    Returns:
        `patched`, `effect` [example, site]; `base`, `source`, `untouched`, `coasted` [example]; with a dim
        `measure` where several were asked for.
    """
    check_sources(verb, contrasts)
    state = starting_point(recipe, checkpoint)
    by_name = measures.named(measure)
    n_times = 1 if measured_after is None else len(measured_after)
    n_references = len(REFERENCE_ORDER)
    values = np.full((len(contrasts), n_references + len(patched_sites), n_times, len(by_name)), np.nan)
    paths, space = ComputePaths(verb), Workspace()
    steps, measuring = Steps(recipe, state, paths), Measuring(recipe, state, by_name, paths)
    groups = _sharing_batches(contrasts)
    prefetch = GradientPrefetch(recipe, state, [contrasts[members[0]] for members in groups], paths)
    with worker_threads(state.parameters), progress_bar(verb, values[..., 0].size, "step") as bar:
        for members in groups:
            runs = Runs(steps, contrasts[members[0]], named(contrasts, members[0]), prefetch, space)
            with naming(runs.name):
                cells = [values[i].reshape(-1, len(by_name)) for i in members]
                probes = [contrasts[i].probe for i in members]
                fill(cells, probes, measuring, patched_models(runs, patched_sites), _BASE * n_times, bar)
    labels = Labels(measure, contrasts, verb, state.step, {"paths": paths.facts()})
    labelled = [
        labels.effects(
            patched=at[..., n_references:],
            references={name: at[..., i] for i, name in enumerate(REFERENCE_ORDER)},
            sites=patched_sites,
        )
        for at in np.moveaxis(values, (2, 3), (0, 1))
    ]
    if measured_after is None:
        return labelled[0]
    return results.concat(labelled, "step", [state.step + n for n in measured_after])


def fill(
    cells: Sequence[npt.NDArray[np.float64]],
    probes: Sequence[Any],
    measuring: Measuring,
    models: Iterable[Stack | Variants],
    base: int,
    bar: tqdm[Any],
) -> None:
    """Measure models on each of the probes, and write what is found in their order.

    Args:
        cells: of each probe, [n_models, n_measures]; filled in here.
        probes: as many.
        measuring: how models are measured.
        models: in stacks, each of which is let go before the next one is made.
        base: the number of the model that `Variants` are variants of.
        bar: moved by one for each model and probe.
    """
    filled = 0
    for some in models:
        for rows, probe in zip(cells, probes, strict=True):
            if isinstance(some, Variants):
                found = measuring.variants_of(some.models, probe, rows[base], some.prefixes)
            else:
                found = measuring(some, probe)
            rows[filled : filled + len(found)] = found
            bar.update(len(found))
        filled += len(found)
        del some  # before the next ones are made
    if any(filled != len(rows) for rows in cells):
        raise AssertionError(f"measured {filled} models of {[len(rows) for rows in cells]}")


def _sharing_batches(contrasts: Sequence[Contrast]) -> list[list[int]]:
    """Numbers of the contrasts, those with the same base and source objects together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, contrast in enumerate(contrasts):
        groups.setdefault((id(contrast.base), id(contrast.source)), []).append(i)
    return list(groups.values())


def reference_models_trimmed(runs: Runs) -> Iterator[Stack]:
    """The models of `REFERENCE_ORDER`, with freed memory trimmed around each gradient."""

    def sparing() -> Iterator[StepGradient]:
        parameters = runs.checkpoint.parameters
        steps = _reference_steps(runs)
        for _ in REFERENCE_ORDER:
            trim_freed_memory(parameters)
            step = next(steps)
            trim_freed_memory(parameters)
            yield step
            del step

    return _stepped(runs, sparing(), Workspace, HALF)


def reference_models(runs: Runs) -> Iterator[Stack]:
    """The models of `REFERENCE_ORDER`, each in memory of its own."""
    return _stepped(runs, _reference_steps(runs), Workspace, HALF)


def _reference_steps(runs: Runs) -> Iterator[StepGradient]:
    steps = {
        "untouched": lambda: runs.no_gradient,
        "coasted": lambda: runs.zero_gradient,
        "base": lambda: runs.base,
        "source": lambda: runs.source,
    }
    return (steps[name]() for name in REFERENCE_ORDER)


def stepped_models(
    runs: Runs, gradients: Iterable[StepGradient], share: float = 1, beside: Sequence[StepGradient] = ()
) -> Iterator[Stack]:
    """The models after a step with each of the gradients, as many of them at a time as that share of memory allows.

    Each stack holds until the next one is asked for. Where there are worker threads they begin on the next one
    while it is measured, in memory of its own.

    Args:
        beside: whose models come first in every stack; left out of one for which memory is too short.
    """
    begun: deque[Callable[[], Iterator[Stack]]] = deque()
    spaces = cycle([runs.space, Workspace()] if has_workers() else [runs.space])
    most = models_per_stack(runs.checkpoint.parameters.values(), share, len(beside))
    if most < 1:
        most, beside = 1, ()
    many = chunks(gradients, most)
    for steps, space in zip(many, spaces, strict=False):
        begun.append(_begun(runs, space, steps, beside))
        del steps  # while the stack is measured
        if not has_workers() or len(begun) > 1:
            yield from begun.popleft()()
    for finish in begun:
        yield from finish()


def stepped_variants(
    runs: Runs, gradients: Iterable[StepGradient], share: float = 1
) -> Iterator[Stack | Variants]:
    """The same, as variants of the model after the base step where two models fit the memory."""
    for models in stepped_models(runs, gradients, share, [runs.base]):
        yield Variants(models, None) if len(models) > 1 else models
        del models  # before the next ones are made


def _stepped(
    runs: Runs, gradients: Iterable[StepGradient], space: Callable[[], Workspace], share: float
) -> Iterator[Stack]:
    many = chunks(gradients, models_per_stack(runs.checkpoint.parameters.values(), share))
    return chain.from_iterable(_begun(runs, space(), steps)() for steps in many)


def _begun(
    runs: Runs, space: Workspace, steps: list[StepGradient], beside: Sequence[StepGradient] = ()
) -> Callable[[], Iterator[Stack]]:
    """What gives one stack of the models after these steps; where memory runs out one of either half."""

    def halved(error: Exception) -> Iterator[Stack]:
        if len(beside) + len(steps) < 2 or not out_of_memory(error):
            raise error
        runs.steps.paths.fell_back("steps", "fewer at a time", reason(error))
        if len(steps) == 1:
            return _begun(runs, space, steps)()
        middle = len(steps) // 2
        halves = steps[:middle], steps[middle:]
        return chain.from_iterable(_begun(runs, space, half, beside)() for half in halves)

    try:
        finish = runs.steps.begin([step.gradients for step in (*beside, *steps)], space)
    except Exception as error:  # noqa: BLE001 (raised again where memory did not run out)
        return partial(halved, error)

    def finished() -> Iterator[Stack]:
        try:
            moved = finish()
        except Exception as error:  # noqa: BLE001 (raised again where memory did not run out)
            yield from halved(error)
            return
        n, buffers = len(beside) + len(steps), stack([step.buffers for step in (*beside, *steps)])
        steps.clear()  # while the stack is measured
        yield Stack(n, {**moved.shared, **buffers.shared}, {**moved.stacked, **buffers.stacked})

    return finished
