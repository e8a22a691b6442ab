"""What every patching verb of a training step shares: its two runs, its references, its Dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints import Checkpoint
from dynamics import measures, results, sites
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe, RecipeError
from dynamics.sites import Site
from dynamics.steps import StepGradient, gradient, steps_from
from dynamics.steps.calls import call, evaluating
from dynamics.trees import Gradients

T = TypeVar("T")

CHUNK = 16
"""Steps stacked at once; fixed, so that the same call gives the same bits."""

SECONDS_BEFORE_PROGRESS = 5


@dataclass(frozen=True)
class Runs:
    """The two runs of one contrast at one checkpoint: their gradients and buffers before clipping."""

    checkpoint: Checkpoint
    base: StepGradient
    source: StepGradient

    def coasting(self) -> dict[str, Tensor | None]:
        """The base gradient set to zero: momentum and decay alone move what it would have moved."""
        return {name: None if g is None else torch.zeros_like(g) for name, g in self.base.gradients.items()}


Outcome = Mapping[str, Tensor]
"""A model after a step: all its parameters and buffers by name."""


def experiment(
    verb: str,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    patched_sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    outcomes: Callable[[Recipe, Runs, Sequence[Site]], Iterable[Outcome]],
) -> xr.Dataset:
    """Run one verb over contrasts and sites and label what is measured.

    Args:
        verb: its name, for provenance and the progress bar.
        recipe, checkpoint, contrasts, patched_sites, measure: as the verb was called.
        outcomes: yields the models after the base step, the source step, the coasting step, and then the
            step patched at each site, in order. Each yields tensors of its own, since a measure may write
            into them.

    Returns:
        `patched`, `effect` [example, site]; `base`, `source`, `untouched`, `coasted` [example]; with a dim
        `measure` where several were asked for.
    """
    if not contrasts or not patched_sites:
        missing = "contrasts" if not contrasts else "sites"
        raise ValueError(f"{verb} was given no {missing}; it needs at least one.")
    sites.check(patched_sites, recipe.model)
    state = starting_point(recipe, checkpoint)
    by_name = measures.named(measure)
    values = np.full((len(contrasts), 4 + len(patched_sites), len(by_name)), np.nan)
    with tqdm(total=values[..., 0].size, desc=verb, unit="step", delay=SECONDS_BEFORE_PROGRESS) as bar:
        for number, (row, contrast) in enumerate(zip(values, contrasts, strict=True)):
            name = str(contrast.coords.get("example", f"contrast {number}"))
            runs = Runs(
                state,
                base=gradient(recipe, state, contrast.base, f"the base batch of {name}"),
                source=gradient(recipe, state, contrast.source, f"the source batch of {name}"),
            )
            untouched = own({**state.parameters, **state.buffers})
            models = chain([untouched], outcomes(recipe, runs, patched_sites))
            for cell, tensors in zip(row, models, strict=True):
                with state.random_state():
                    cell[:] = evaluated(recipe, by_name, tensors, contrast)
                bar.update()
    references = {name: values[:, i] for i, name in enumerate(("untouched", "base", "source", "coasted"))}
    several = isinstance(measure, Mapping)
    return results.effects(
        patched=np.moveaxis(values[:, 4:], -1, 0) if several else values[:, 4:, 0],
        references={n: v.T if several else v[:, 0] for n, v in references.items()},
        example_coords=columns([{"example": f"contrast {i}", **c.coords} for i, c in enumerate(contrasts)]),
        site_coords=columns([{"site": s.label, **s.coords} for s in patched_sites]),
        measure_names=list(by_name) if several else None,
        units=[getattr(m, "units", "") for m in by_name.values()]
        if several
        else getattr(measure, "units", ""),
        provenance=results.provenance(verb=verb, step=state.step, measure=list(by_name)),
    )


def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that nothing else holds."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def starting_point(recipe: Recipe, checkpoint: Checkpoint | None) -> Checkpoint:
    """The checkpoint on the model's device; without one, the recipe's model as it stands, optimizer new.

    Raises:
        RecipeError: the checkpoint is of another model.
    """
    if checkpoint is None:
        optimizer = recipe.build_optimizer(recipe.model.parameters())
        return Checkpoint.capture(recipe.model, optimizer, recipe.build_scheduler(optimizer))
    for kind, recorded, present in (
        ("parameters", checkpoint.parameters, dict(recipe.model.named_parameters())),
        ("buffers", checkpoint.buffers, dict(recipe.model.named_buffers())),
    ):
        differing = _described(recorded) ^ _described(present)
        if differing:
            raise RecipeError(
                f"checkpoint {checkpoint.step} does not fit the recipe's model: their {kind} differ in "
                f"{', '.join(sorted({name for name, *_ in differing})[:5])} (name, shape or dtype)."
            )
    return checkpoint.to(next(recipe.model.parameters()).device)


def _described(tensors: Mapping[str, Tensor]) -> set[tuple[str, torch.Size, torch.dtype]]:
    return {(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def evaluated(
    recipe: Recipe, by_name: Mapping[str, Measure], tensors: Outcome, contrast: Contrast
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Each measure on a contrast's probe, with the model's tensors replaced: [n_measures]."""
    with torch.no_grad(), evaluating(recipe.model):
        found = call(lambda m, b: measures.evaluate(by_name, m, b), recipe.model, tensors, contrast.probe)
    return found.double().cpu().numpy()


def stepped(recipe: Recipe, runs: Runs, gradients: Iterable[Gradients]) -> Iterator[dict[str, Tensor]]:
    """Parameters after a step with each of the gradients, `CHUNK` of them at a time."""
    for chunk in chunks(gradients, CHUNK):
        yield from steps_from(recipe, runs.checkpoint, chunk)


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def columns(rows: Sequence[Mapping[str, str | int | float]]) -> dict[str, list[str | int | float | None]]:
    """Rows of labels as columns; a label that a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
