"""When do reliable and unreliable definitions part, in gradient alignment and in accuracy?

The cosine between the gradient of each alias's definition, as training gives it and under the other tag, and that of
its questions, at log-spaced steps of X1 and X2 of several runs; beside it the accuracy of the four sets. A curve's
change point is that of a piecewise-constant fit along the log-spaced steps.

    .venv/bin/python scripts/alignment.py runs/seeds-fresh/train-5-seed-*/drawn --out runs/alignment --readme
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from into_readme import run_key

import dynamics as dy
from checkpoints import Checkpoint, Trajectory

POINTS = 22
"""Log-spaced steps of a phase, beside its first."""


def steps_of(task: dy.tasks.AliasTask, phase: str) -> list[int]:
    """The steps of a phase that are measured, from its first to the one after its last."""
    starts = list(task.config.phases.starts.items())
    (first, last) = next(
        (start, following)
        for (name, start), (_, following) in zip(starts, starts[1:], strict=False)
        if name == phase
    )
    spaced = np.unique(np.round(np.geomspace(1, last - first, POINTS)).astype(int))
    return [first, *(first + int(n) for n in spaced)]


def one_run(folder: Path, out: Path) -> dict[str, xr.Dataset]:
    """Alignment and scores of one run along its steps; kept under `out` and taken from there when they exist."""
    run = Trajectory.open(folder)
    names = ("scores", "trained", "exchanged")
    paths = {name: out / run_key(run) / f"{name}.h5" for name in names}
    if not all(path.exists() for path in paths.values()):
        task = dy.tasks.load(run.config)
        recipe = task.recipe()
        sites = [dy.sites.everything(recipe.model), *dy.sites.components(recipe.model)]
        contrasts = dy.tasks.as_trained(task)
        exchanged = [contrast.reversed() for contrast in contrasts]

        def quantities(state: Checkpoint) -> dict[str, xr.Dataset]:
            return {
                "scores": dy.comparison.score(recipe, state, task.evaluation),
                **{
                    name: dy.comparison.relations(dy.comparison.align_groups(recipe, state, which, sites))
                    for name, which in (("trained", contrasts), ("exchanged", exchanged))
                },
            }

        steps = sorted({*steps_of(task, "x1"), *steps_of(task, "x2")})
        found = dy.comparison.over_training(quantities, run, steps, recipe, task.batch)
        for name, dataset in found.items():
            paths[name].unlink(missing_ok=True)
            dy.results.save(dataset, paths[name])
    return {name: dy.results.load(path) for name, path in paths.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, one per seed; at least two")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument(
        "--readme", action="store_true", help="write the table and the figure into the README"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    found = [one_run(folder, given.out) for folder in given.runs]


if __name__ == "__main__":
    main()
