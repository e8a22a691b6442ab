"""A quantity along training: at every step, between neighbours, or against one checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import xarray as xr
from tqdm.auto import tqdm

from checkpoints import Checkpoint, Trajectory
from dynamics import results
from dynamics.engine.progress import SECONDS_BEFORE_PROGRESS
from dynamics.recipe import Recipe
from dynamics.steps import advance

Quantity = Callable[..., Mapping[str, xr.Dataset]]
"""Checkpoints -> {name: Dataset}."""


def over_training(
    quantities: Mapping[int, Quantity],
    run: Trajectory,
    steps: Sequence[int],
    recipe: Recipe,
    batch_of: Callable[[int], Any],
) -> dict[str, xr.Dataset]:
    """Ask the same of every checkpoint, or of every few neighbours, and put the answers along `step`.

    Checkpoints are read once, one after another, and only as many are held as a quantity takes; a step between
    stored ones is reached by training on from the last. `sweep` asks a verb the same way, of many runs and by many
    workers.

    Args:
        quantities: by how many checkpoints in a row each is given. 1: a curve, such as
            `lambda c: {"score": score(recipe, c, sets)}`, or a distance from a fixed one, such as
            `lambda c: dy.compare(first, c, recipe, sets, sites)`; 2: a comparison of neighbours, such as
            `lambda a, b: dy.compare(a, b, recipe, sets, sites)`; 3: that of their updates. A name that is not
            always among its answers has only the steps where it is.
        run: its stored checkpoints.
        steps: rising, at least as many as a quantity takes.
        recipe: how the run was trained.
        batch_of: the training batch of a step, such as `task.batch`; asked only for steps that are not stored.

    Returns:
        By name, each Dataset with a dim `step`: that of the last checkpoint given. Of several neighbours a
        coordinate `previous` says the step of the first.

    Raises:
        ValueError: steps do not rise, or are too few; two quantities give the same name.
        TrajectoryError: a checkpoint cannot be read, or nothing is stored before the first step.
    """
    chosen, most = [int(step) for step in steps], max(quantities, default=0)
    if min(quantities, default=0) < 1 or len(chosen) < most or any(b <= a for a, b in pairwise(chosen)):
        raise ValueError(
            f"found steps {chosen[:8]} for quantities of {sorted(quantities)} checkpoints; expected rising steps, "
            "at least as many as each takes."
        )
    held: deque[Checkpoint] = deque(maxlen=most)
    answers: dict[str, tuple[int, dict[int, xr.Dataset]]] = {}
    bar = tqdm(chosen, desc="over training", unit="step", delay=SECONDS_BEFORE_PROGRESS)
    for state in _reached(recipe, run, bar, batch_of):
        held.append(state)
        for n, quantity in quantities.items():
            if len(held) < n:
                continue
            for name, dataset in quantity(*list(held)[-n:]).items():
                given, at = answers.setdefault(name, (n, {}))
                if given != n:
                    raise ValueError(f"quantities of {given} and of {n} checkpoints both give {name!r}.")
                at[state.step] = dataset
    found = {}
    for name, (n, at) in answers.items():
        joined = results.concat(at.values(), "step", list(at))
        first = [chosen[chosen.index(step) - n + 1] for step in at]
        found[name] = joined if n == 1 else joined.assign_coords(previous=("step", first))
    return found


def _reached(
    recipe: Recipe, run: Trajectory, steps: Sequence[int] | tqdm[int], batch_of: Callable[[int], Any]
) -> Iterator[Checkpoint]:
    """The checkpoints of rising steps: stored ones as they are, others trained on to from the nearest before."""
    last: Checkpoint | None = None
    for step in steps:
        stored = max((s for s in run.steps if s <= step), default=-1)
        if last is None or stored > last.step:
            last = run.before(step)
        last = advance(recipe, last, step, batch_of)
        yield last
