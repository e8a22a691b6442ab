"""When do reliable and unreliable definitions part, in gradient alignment and in accuracy?

The cosine between the gradient of each alias's definition, as training gives it and under the other tag, and that of
its questions, at log-spaced steps of X1 and X2 of several runs; beside it the accuracy of the four sets and where heads
look. An event is the change point of a curve's piecewise-constant fit along the log-spaced steps.

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
    starts = task.config.phases.starts
    first, last = starts[phase], starts["x2" if phase == "x1" else "end"]
    spaced = np.unique(np.round(np.geomspace(1, last - first, POINTS)).astype(int))
    return [first, *(first + int(n) for n in spaced)]


def one_run(folder: Path, out: Path) -> dict[str, xr.Dataset]:
    """Alignment, scores and roles of one run along its steps; kept under `out`, taken from there when they exist."""
    run = Trajectory.open(folder)
    names = ("scores", "roles", "trained", "exchanged")
    paths = {name: out / run_key(run) / f"{name}.h5" for name in names}
    if not all(path.exists() for path in paths.values()):
        task = dy.tasks.load(run.config)
        recipe = task.recipe()
        sites = [dy.sites.everything(recipe.model), *dy.sites.components(recipe.model)]
        contrasts, roles = dy.tasks.as_trained(task), dy.tasks.head_roles(task)
        heads = dy.sites.activations(recipe.model, "*hook_pattern", ("layer", "head"), contrasts[0].probe)

        def quantities(state: Checkpoint) -> dict[str, xr.Dataset]:
            aligned = dy.comparison.align_groups(recipe, state, contrasts, sites)
            return {
                "scores": dy.comparison.score(recipe, state, task.evaluation),
                "roles": dy.comparison.head_roles(recipe, state, roles, heads),
                "trained": dy.comparison.relations(aligned),
                "exchanged": dy.comparison.relations(aligned, "source"),
            }

        steps = sorted({*steps_of(task, "x1"), *steps_of(task, "x2")})
        found = dy.comparison.over_training({1: quantities}, run, steps, recipe, task.batch)
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
