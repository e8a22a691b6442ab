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
from dynamics.patching.experiment import SECONDS_BEFORE_PROGRESS
from dynamics.recipe import Recipe
from dynamics.steps import advance

Quantity = Callable[..., Mapping[str, xr.Dataset]]


def over_training(
    quantity: Quantity,
    run: Trajectory,
    steps: Sequence[int],
    recipe: Recipe,
    batch_of: Callable[[int], Any],
    n_neighbours: int = 1,
) -> dict[str, xr.Dataset]:
    """Ask the same of every checkpoint, or of every few neighbours, and put the answers along `step`.

    Checkpoints are read one after another and only `n_neighbours` are held; a step between stored ones is reached
    by training on from the last. `sweep` asks a verb the same way, of many runs and by many workers.

    Args:
        quantity: checkpoints -> {name: Dataset}. Of one checkpoint (`n_neighbours=1`) a curve, such as
            `lambda c: {"score": score(recipe, c, sets)}`, or a distance from a fixed one, such as
            `lambda c: dy.compare(first, c, recipe, sets)`; of two a comparison of neighbours, such as
            `lambda a, b: dy.compare(a, b, recipe, sets)`; of three that of their updates.
        run: its stored checkpoints.
        steps: rising, at least `n_neighbours` of them.
        recipe: how the run was trained.
        batch_of: the training batch of a step, such as `task.batch`; asked only for steps that are not stored.
        n_neighbours: how many checkpoints a quantity is given.

    Returns:
        By name, each Dataset with a dim `step`: that of the last checkpoint given. Of several neighbours a
        coordinate `previous` says the step of the first.

    Raises:
        ValueError: steps do not rise, or are too few.
        TrajectoryError: a checkpoint cannot be read, or nothing is stored before the first step.
    """
    chosen = [int(step) for step in steps]
    if n_neighbours < 1 or len(chosen) < n_neighbours or any(b <= a for a, b in pairwise(chosen)):
        raise ValueError(
            f"found steps {chosen[:8]} for n_neighbours={n_neighbours}; expected rising steps, at least so many."
        )
    held: deque[Checkpoint] = deque(maxlen=n_neighbours)
    found: dict[str, list[xr.Dataset]] = {}
    bar = tqdm(chosen, desc="over training", unit="step", delay=SECONDS_BEFORE_PROGRESS)
    for state in _reached(recipe, run, bar, batch_of):
        held.append(state)
        if len(held) == n_neighbours:
            for name, dataset in quantity(*held).items():
                found.setdefault(name, []).append(dataset)
    last = chosen[n_neighbours - 1 :]
    joined = {name: results.concat(parts, "step", last) for name, parts in found.items()}
    if n_neighbours == 1:
        return joined
    first = chosen[: len(last)]
    return {name: dataset.assign_coords(previous=("step", first)) for name, dataset in joined.items()}


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
