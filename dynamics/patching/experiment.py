"""What every patching verb of a training step shares: its two runs, its references, its Dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints import Checkpoint
from dynamics import measures, results
from dynamics.labels import Labels, check_coordinates, example_columns
from dynamics.measures import Measure
from dynamics.patching.ahead import Ahead
from dynamics.patching.measuring import Beginnings, Measuring
from dynamics.patching.memory import HALF, at_most, chunks, give_back
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site
from dynamics.steps import StepGradient
from dynamics.steps.factors import Factors, factors
from dynamics.steps.stacks import Stack, Workspace, stack
from dynamics.steps.states import starting_point
from dynamics.steps.update import Steps

REFERENCE_ORDER = ("untouched", "coasted", "base", "source")
"""What every patched step is compared with, in the order in which the models are made: where they are large, no
more than two of them are held, and two gradients."""

SECONDS_BEFORE_PROGRESS = 5


@dataclass(frozen=True)
class Runs:
    """The two runs of one contrast at one checkpoint.

    Attributes:
        steps: how steps are taken, and from where.
        contrast: on which batches.
        name: how errors name the contrast.
        ahead: who takes the gradients.
        space: memory for stacks that are measured one after another.
        known: gradients that were taken already, by "base" and "source".
    """

    steps: Steps
    contrast: Contrast
    name: str
    ahead: Ahead
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
    def where(self) -> tuple[str, str]:
        """How errors name the base and the source batch."""
        return f"the base batch of {self.name}", f"the source batch of {self.name}"

    @cached_property
    def base(self) -> StepGradient:
        """Gradient and buffers of the base batch, before clipping."""
        return self.known.get("base") or self.ahead.gradient(self.contrast.base, self.where[0])

    @cached_property
    def source(self) -> StepGradient:
        """Gradient and buffers of the source batch, before clipping; the base's own where the batches are one."""
        if self.contrast.source is self.contrast.base:
            return self.base
        return self.known.get("source") or self.ahead.gradient(self.contrast.source, self.where[1])

    @cached_property
    def nothing(self) -> StepGradient:
        """No gradient at all: nothing moves."""
        return replace(
            self.base,
            gradients=dict.fromkeys(self.checkpoint.parameters),
            buffers=dict(self.checkpoint.buffers),
        )

    @property
    def coasting(self) -> StepGradient:
        """The base gradient set to zero: momentum and decay alone move what it would have moved."""
        return replace(self.base, gradients={n: _zero(g) for n, g in self.base.gradients.items()})

    def forget(self, names: Iterable[str] = ("base", "source")) -> None:
        """Let go of the gradient of the base or the source batch, or of both: each is as large as the model."""
        for name in names:
            self.known.pop(name, None)
            self.__dict__.pop(name, None)

    @cached_property
    def base_factors(self) -> Factors:
        """The factors of the base batch's gradient."""
        return factors(self.recipe, self.checkpoint, self.contrast.base, self.where[0])

    @cached_property
    def source_factors(self) -> Factors:
        """The factors of the source batch's gradient."""
        return factors(self.recipe, self.checkpoint, self.contrast.source, self.where[1])


def _zero(gradient: Tensor | None) -> Tensor | None:
    """Zero where there is a gradient, one number for all elements; of a sparse one, in the rows it stores."""
    if gradient is None or gradient.is_sparse:
        return None if gradient is None else gradient * 0
    return gradient.new_zeros(()).expand_as(gradient)


@dataclass(frozen=True)
class Beside:
    """Models that share with the base model what they do not change; the first of them is the base model.

    Attributes:
        models: these.
        begun: what is known of the base model's passes on each probe.
    """

    models: Stack
    begun: Beginnings


Outcomes = Callable[[Runs, Sequence[Site]], Iterable[Stack | Beside]]
"""Models after a step, in stacks: all their parameters and buffers by name."""


def experiment(
    verb: str,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    patched_sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    outcomes: Outcomes,
    measured_after: Sequence[int] | None = None,
) -> xr.Dataset:
    """Run one verb over contrasts and sites and label what is measured.

    Contrasts that share their base and source batch are run once and measured on each one's probe.

    Args:
        verb: its name, for provenance and the progress bar.
        recipe, checkpoint, contrasts, patched_sites, measure: as the verb was called.
        outcomes: yields the models of `REFERENCE_ORDER`, then that of the step patched at each site, in order; each
            of them once for every entry of `measured_after`.
        measured_after: numbers of steps, which become the dim `step`; None where a single step is taken.

    Returns:
        `patched`, `effect` [example, site]; `base`, `source`, `untouched`, `coasted` [example]; with a dim
        `measure` where several were asked for.
    """
    if not contrasts or not patched_sites:
        missing = "contrasts" if not contrasts else "sites"
        raise ValueError(f"{verb} was given no {missing}; it needs at least one.")
    state = starting_point(recipe, checkpoint)
    by_name = measures.named(measure)
    if not by_name:
        raise ValueError(f"{verb} was given no measures; it needs at least one.")
    if len(set(example_columns(contrasts)["example"])) < len(contrasts):
        raise ValueError("contrasts share a label in coords['example']; give each its own.")
    check_coordinates(contrasts, patched_sites)
    n_times = 1 if measured_after is None else len(measured_after)
    n_references = len(REFERENCE_ORDER)
    values = np.full((len(contrasts), n_references + len(patched_sites), n_times, len(by_name)), np.nan)
    steps, measuring, space = Steps(recipe, state), Measuring(recipe, state, by_name), Workspace()
    groups = _sharing_batches(contrasts)
    ahead = Ahead(recipe, state, [contrasts[members[0]] for members in groups])
    with tqdm(total=values[..., 0].size, desc=verb, unit="step", delay=SECONDS_BEFORE_PROGRESS) as bar:
        for members in groups:
            first = contrasts[members[0]]
            name = str(first.coords.get("example", f"contrast {members[0]}"))
            runs = Runs(steps, first, name, ahead, space)
            filled = 0
            for models in outcomes(runs, patched_sites):
                for i in members:
                    cells, probe = values[i].reshape(-1, len(by_name)), contrasts[i].probe
                    if isinstance(models, Beside):
                        found = measuring.beside(
                            models.models, probe, cells[REFERENCE_ORDER.index("base") * n_times], models.begun
                        )
                    else:
                        found = measuring(models, probe)
                    cells[filled : filled + len(found)] = found
                    bar.update(len(found))
                filled += len(found)
                del models  # before the next ones are made
            if filled != values[0, ..., 0].size:
                raise AssertionError(f"{verb} measured {filled} models of {values[0, ..., 0].size}")
    labels = Labels(measure, contrasts, verb, state.step, {})
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


def _sharing_batches(contrasts: Sequence[Contrast]) -> list[list[int]]:
    """Numbers of the contrasts, those with the same base and source objects together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, contrast in enumerate(contrasts):
        groups.setdefault((id(contrast.base), id(contrast.source)), []).append(i)
    return list(groups.values())


def references(runs: Runs) -> Iterator[Stack]:
    """The same as `reference_models`; what gradients and steps leave behind is given back around each gradient."""

    def sparing() -> Iterator[StepGradient]:
        parameters = runs.checkpoint.parameters
        steps = _reference_steps(runs)
        for _ in REFERENCE_ORDER:
            give_back(parameters)
            step = next(steps)
            give_back(parameters)
            yield step
            del step

    return _stepped(runs, sparing(), Workspace, HALF)


def reference_models(runs: Runs) -> Iterator[Stack]:
    """The models of `REFERENCE_ORDER`, each in memory of its own."""
    return _stepped(runs, _reference_steps(runs), Workspace, HALF)


def _reference_steps(runs: Runs) -> Iterator[StepGradient]:
    steps = {
        "untouched": lambda: runs.nothing,
        "coasted": lambda: runs.coasting,
        "base": lambda: runs.base,
        "source": lambda: runs.source,
    }
    return (steps[name]() for name in REFERENCE_ORDER)


def stepped(runs: Runs, gradients: Iterable[StepGradient], share: float = 1) -> Iterator[Stack]:
    """The models after a step with each of the gradients, as many of them at a time as that share of memory allows.

    Each stack holds until the next one is asked for.
    """
    return _stepped(runs, gradients, lambda: runs.space, share)


def _stepped(
    runs: Runs, gradients: Iterable[StepGradient], space: Callable[[], Workspace], share: float
) -> Iterator[Stack]:
    def after(chunk: list[StepGradient]) -> Stack:
        moved = runs.steps.take([step.gradients for step in chunk], space())
        buffers = stack([step.buffers for step in chunk])
        return Stack(len(chunk), {**moved.shared, **buffers.shared}, {**moved.stacked, **buffers.stacked})

    return map(after, chunks(gradients, at_most(runs.checkpoint.parameters.values(), share)))
