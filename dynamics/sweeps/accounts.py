"""account: the account of a recorded run, stretch by stretch, by one process or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import xarray as xr

from checkpoints import Checkpoint, Trajectory
from dynamics import tasks
from dynamics.attribution.training import attribute_training
from dynamics.batch import Batch
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site
from dynamics.sweeps.estimates import Estimate, estimate
from dynamics.sweeps.planning import Plan, Sites, expect_steps, of_config, plan
from dynamics.sweeps.running import run as carry_out
from dynamics.sweeps.units import Task

Probes = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]
Sources = Callable[[Any, Any], Sequence[Hashable]]

TRIED = 5
"""Steps that an estimate takes."""


def of_evaluation(task: tasks.Task) -> dict[str, Batch]:
    """What a run of this package is watched on, up to the positions that are scored, but what it was trained on.

    Of the alias task the questions of Dt3 and Df4.
    """
    known = dict(task.evaluation)
    chosen: list[str] = [name for name in ("Dt3", "Df4") if name in known]
    chosen = chosen or [name for name in known if name not in ("heldout", "trained")] or ["heldout"]
    read = {name: int(known[name].target_pos.max()) + 1 for name in chosen}
    return {name: replace(known[name], tokens=known[name].tokens[:, :last]) for name, last in read.items()}


def account(
    run: Trajectory,
    first: int,
    last: int,
    sites: Sites,
    measure: Measure | Mapping[str, Measure],
    probes: Probes = of_evaluation,
    sources: Sources | None = None,
    every: int = 1,
    tolerance: float = 0.01,
    stretch: int | None = None,
    *,
    task_of: Callable[[Trajectory], Task] = of_config,
    out: str | os.PathLike[str] | None = None,
    workers: int = 0,
    scheduler: Any = None,
) -> xr.Dataset:
    """The account of a recorded run between two of its steps: `attribute_training` without any new training.

    The run is replayed from its stored checkpoints. In stretches it is computed by several workers, kept stretch by
    stretch, and joined; the result is the same to the bit, whoever computes it. Each stretch counts momentum from
    its own beginning as `before`: of β1 = 0.9 the gradients of some ten steps, so that stretches should be long.

    Args:
        run: a run.
        first, last: steps of it, stored or not.
        sites: a list; or a function model -> list, such as `dy.sites.components`.
        measure: as `attribute_training`.
        probes: {label: batch}, or a function of the task that gives it.
        sources: (task, batch) -> a label for each row, such as `AliasTask.sources`.
        every, tolerance: as `attribute_training`.
        stretch: steps of a stretch; None takes all at once.
        task_of, out, workers, scheduler: as `sweep`.

    Returns, Raises: as `attribute_training` and `sweep`.
    """
    asked = _plan(run, first, last, sites, measure, probes, sources, every, tolerance, stretch, task_of)
    return carry_out(asked, out, workers, scheduler)


def estimate_account(run: Trajectory, first: int, last: int, *asked: Any, **settings: Any) -> Estimate:
    """What `account` will take: its first five steps are tried and timed, and nothing is kept.

    Args, Raises: as `account`.
    """
    tried = min(TRIED, last - first)
    given = signature(account).bind(run, first, first + tried, *asked, **{**settings, "stretch": None})
    given.apply_defaults()
    workers = given.arguments["workers"]
    of_few = _plan(**{name: given.arguments[name] for name in signature(_plan).parameters})
    found = estimate(of_few, None, 0)
    times = (last - first) / tried
    return replace(
        found,
        replays=round(found.replays * times),
        seconds=found.seconds * times / max(1, workers),
        workers=workers,
    )


def _plan(
    run: Trajectory,
    first: int,
    last: int,
    sites: Sites,
    measure: Measure | Mapping[str, Measure],
    probes: Probes,
    sources: Sources | None,
    every: int,
    tolerance: float,
    stretch: int | None,
    task_of: Callable[[Trajectory], Task],
) -> Plan:
    length = stretch or last - first
    if not 0 < length <= last - first:
        raise ValueError(
            f"an account from step {first} to {last} in stretches of {stretch}: give steps that rise, and "
            "stretches of one step or more that are no longer than all of it."
        )

    def contrasts(task: Any, begin: int) -> list[Contrast]:
        batches = [task.batch(step) for step in range(begin, min(begin + length, last))]
        labels = None if sources is None else [list(sources(task, batch)) for batch in batches]
        by_label = probes(task) if callable(probes) else probes
        return [Contrast(batches, labels, probe, {"example": str(name)}) for name, probe in by_label.items()]

    expect_steps(run, [first, last])
    begins = list(range(first, last, length))
    verb = partial(_of_stretch, every=every, tolerance=tolerance)
    return plan(
        verb, run, begins[0] if len(begins) == 1 else begins, contrasts, sites, measure, task_of=task_of
    )


def _of_stretch(
    recipe: Recipe,
    checkpoint: Checkpoint,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    every: int,
    tolerance: float,
) -> xr.Dataset:
    """`attribute_training` as a sweep calls a verb: contrasts hold the stretch's batches and the sources of their
    rows, and a probe each."""
    batches, labels = contrasts[0].base, contrasts[0].source
    given = None if labels is None else iter(labels)
    return attribute_training(
        recipe,
        checkpoint,
        batches,
        sites,
        {str(c.coords["example"]): c.probe for c in contrasts},
        measure,
        None if given is None else lambda batch: next(given),
        every,
        tolerance,
    )
