"""What every patching verb of a training step shares: its two runs, its references, its Dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints import Checkpoint
from dynamics import measures, results
from dynamics.measures import Measure
from dynamics.patching.measuring import Measuring
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site
from dynamics.steps import StepGradient, gradient
from dynamics.steps.factors import Factors, factors
from dynamics.steps.stacks import Stack, Workspace, stack
from dynamics.steps.states import starting_point
from dynamics.steps.update import Steps

T = TypeVar("T")

CHUNK = 16
"""Models stacked at most."""

STACKED_BYTES = 2**27
"""Tensors stacked at most, one model's always; both fixed, so that the same call gives the same bits."""

SECONDS_BEFORE_PROGRESS = 5


@dataclass(frozen=True)
class Runs:
    """The two runs of one contrast at one checkpoint.

    Attributes:
        steps: how steps are taken, and from where.
        contrast: on which batches.
        name: how errors name the contrast.
        space: memory for stacks that are measured one after another.
    """

    steps: Steps
    contrast: Contrast
    name: str
    space: Workspace = field(default_factory=Workspace)

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
        return gradient(self.recipe, self.checkpoint, self.contrast.base, self.where[0])

    @cached_property
    def source(self) -> StepGradient:
        """Gradient and buffers of the source batch, before clipping; the base's own where the batches are one."""
        if self.contrast.source is self.contrast.base:
            return self.base
        return gradient(self.recipe, self.checkpoint, self.contrast.source, self.where[1])

    @cached_property
    def nothing(self) -> StepGradient:
        """No gradient at all: nothing moves."""
        return replace(
            self.base,
            gradients=dict.fromkeys(self.checkpoint.parameters),
            buffers=dict(self.checkpoint.buffers),
        )

    @cached_property
    def coasting(self) -> StepGradient:
        """The base gradient set to zero: momentum and decay alone move what it would have moved."""
        return replace(self.base, gradients={n: _zero(g) for n, g in self.base.gradients.items()})

    @cached_property
    def base_factors(self) -> Factors:
        """The factors of the base batch's gradient."""
        return factors(self.recipe, self.checkpoint, self.contrast.base, self.where[0])

    @cached_property
    def source_factors(self) -> Factors:
        """The factors of the source batch's gradient."""
        return factors(self.recipe, self.checkpoint, self.contrast.source, self.where[1])


def _zero(gradient: Tensor | None) -> Tensor | None:
    """Zero where there is a gradient; of a sparse one, in the rows it stores."""
    if gradient is None:
        return None
    return gradient * 0 if gradient.is_sparse else torch.zeros_like(gradient)


@dataclass(frozen=True)
class Beside:
    """Models that share with the base model what they do not change; the first of them is the base model."""

    models: Stack


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
        outcomes: yields the model after no step, the base step, the source step, the coasting step, and then the
            step patched at each site, in order; each of them once for every entry of `measured_after`.
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
    examples = columns([{"example": f"contrast {i}", **c.coords} for i, c in enumerate(contrasts)])
    if len(set(examples["example"])) < len(contrasts):
        raise ValueError("contrasts share a label in coords['example']; give each its own.")
    n_times = 1 if measured_after is None else len(measured_after)
    values = np.full((len(contrasts), 4 + len(patched_sites), n_times, len(by_name)), np.nan)
    steps, measuring, space = Steps(recipe, state), Measuring(recipe, state, by_name), Workspace()
    with tqdm(total=values[..., 0].size, desc=verb, unit="step", delay=SECONDS_BEFORE_PROGRESS) as bar:
        for members in _sharing_batches(contrasts):
            first = contrasts[members[0]]
            name = str(first.coords.get("example", f"contrast {members[0]}"))
            runs = Runs(steps, first, name, space)
            filled = 0
            for models in outcomes(runs, patched_sites):
                for i in members:
                    cells, probe = values[i].reshape(-1, len(by_name)), contrasts[i].probe
                    if isinstance(models, Beside):
                        found = measuring.beside(models.models, probe, cells[n_times])
                    else:
                        found = measuring(models, probe)
                    cells[filled : filled + len(found)] = found
                    bar.update(len(found))
                filled += len(found)
            if filled != values[0, ..., 0].size:
                raise AssertionError(f"{verb} measured {filled} models of {values[0, ..., 0].size}")
    several = isinstance(measure, Mapping)
    units = [getattr(m, "units", "") for m in by_name.values()]
    labelled = [
        results.effects(
            patched=np.moveaxis(at[:, 4:], -1, 0) if several else at[:, 4:, 0],
            references={
                name: at[:, i].T if several else at[:, i, 0]
                for i, name in enumerate(("untouched", "base", "source", "coasted"))
            },
            example_coords=columns(
                [{"example": f"contrast {i}", **c.coords} for i, c in enumerate(contrasts)]
            ),
            site_coords=columns([{"site": s.label, **s.coords} for s in patched_sites]),
            measure_names=list(by_name) if several else None,
            units=units if several else units[0],
            provenance=results.provenance(verb=verb, step=state.step, measure=list(by_name)),
        )
        for at in np.moveaxis(values, 2, 0)
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
    """The models after no step, the base step, the source step and the coasting step."""
    return _stepped(runs, (runs.nothing, runs.base, runs.source, runs.coasting), Workspace)


def stepped(runs: Runs, gradients: Iterable[StepGradient]) -> Iterator[Stack]:
    """The models after a step with each of the gradients, as many of them at a time as memory allows.

    Each stack holds until the next one is asked for.
    """
    return _stepped(runs, gradients, lambda: runs.space)


def _stepped(
    runs: Runs, gradients: Iterable[StepGradient], space: Callable[[], Workspace]
) -> Iterator[Stack]:
    for chunk in chunks(gradients, at_most(runs.checkpoint.parameters.values())):
        after = runs.steps.take([step.gradients for step in chunk], space())
        buffers = stack([step.buffers for step in chunk])
        yield Stack(len(chunk), {**after.shared, **buffers.shared}, {**after.stacked, **buffers.stacked})


def at_most(tensors: Iterable[Tensor]) -> int:
    """How many copies of these tensors are stacked."""
    return min(CHUNK, max(1, STACKED_BYTES // max(1, sum(t.nbytes for t in tensors))))


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def columns(rows: Sequence[Mapping[str, str | int | float]]) -> dict[str, list[str | int | float | None]]:
    """Rows of labels as columns; a label that a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
