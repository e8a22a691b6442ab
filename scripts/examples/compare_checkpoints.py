"""Checkpoints of a run side by side, the example to copy. About a minute.

What changed between two steps, what changed from each stored checkpoint to the next, and what a verb says at
each of them, site by step under the accuracies. `dynamics compare` asks more of a run of the alias task; here
is every part by itself, for a run, a model and questions of your own.

    .venv/bin/python scripts/examples/compare_checkpoints.py runs/aliases --from 4500 --to 4600 --out runs/compared
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--from", dest="first", type=int, required=True, help="a step, stored or not")
    parser.add_argument("--to", dest="last", type=int, required=True, help="a later one")
    parser.add_argument("--out", type=Path, default=Path("runs/compared"))
    given = parser.parse_args(argv)
    torch.set_num_threads(1)

    run = Trajectory.open(given.run)
    task = dy.tasks.load(run.config)  # of your own: a Recipe, batches of questions by name, and contrasts
    recipe, contrasts = task.recipe(), task.contrasts()
    questions, coords = dy.tasks.alias_questions(task)
    matrices, components = dy.sites.matrices(recipe.model), dy.sites.components(recipe.model)
    like = contrasts[0].probe
    streams = dy.sites.activations(recipe.model, "blocks.*.hook_resid_post", ("layer", "pos"), like)
    heads = dy.sites.activations(recipe.model, "*hook_pattern", ("layer", "head"), like)

    # Two checkpoints: weights, answers, activations, attention.
    before, after = (dy.steps.reach(recipe, run, step, task.batch) for step in (given.first, given.last))
    pair = dy.compare(before, after, recipe, questions, matrices, coords, streams, heads)
    print(most(pair["weights"], "relative"), most(pair["patterns"], "divergence"), sep="\n\n")
    print("", most(pair["logits"], "kl", "example"), sep="\n")
    save(pair, given.out / "pair")
    dy.plots.save(dy.plots.moved(pair["weights"], pair["logits"]), given.out / "moved.png")

    # Every stored step between them: curves (1), neighbours (2), two updates (3), in one walk.
    steps = [step for step in run.steps if given.first <= step <= given.last]
    found = dy.comparison.over_training(
        {
            1: lambda c: {
                "scores": dy.comparison.score(recipe, c, task.evaluation),
                "alignment": dy.comparison.align_gradients(recipe, c, contrasts, components),
            },
            2: lambda a, b: dy.compare(a, b, recipe, questions, matrices, coords, streams, heads),
            3: lambda a, b, c: {"updates": dy.comparison.compare_updates(a, b, c, recipe, matrices)},
        },
        run,
        steps,
        recipe,
        task.batch,
    )
    # Any verb as a function of the step.
    found["effects"] = dy.sweep(
        dy.attribute_step,
        run,
        steps[:-1],
        lambda task, step: task.contrasts(),
        components,
        dy.measures.correct_logit,
    )
    save(found, given.out / "steps")
    for name in map(str, found["scores"]["example"].values):
        event = dy.comparison.when(found["scores"]["accuracy"].sel(example=name))
        at, change = float(event["at"]), float(event["change"])
        found_at = "no change" if np.isnan(at) else f"first change at step {at:.0f}, {change:+.2f}"
        print(f"accuracy of {name}: {found_at}")
    effects = found["effects"].mean("example", keep_attrs=True)
    maps = {
        "weights": (found["weights"], "relative"),
        "alignment": (found["alignment"].mean("example", keep_attrs=True), "effect"),
        "attribution": (effects, "attribution"),
    }
    for name, (dataset, value) in maps.items():
        figure = dy.plots.map_under_accuracies(dataset, value, found["scores"])
        dy.plots.save(figure, given.out / f"{name}.png")


def most(dataset: xr.Dataset, by: str, dim: str = "site") -> str:
    """The five with the largest value."""
    top = dataset.sortby(by, ascending=False).isel({dim: slice(5)})
    rows = zip(top[dim].values, top[by].values, strict=True)
    return "\n".join([f"{dim}, by {by}", *(f"  {label}: {value:.3g}" for label, value in rows)])


def save(found: dict[str, xr.Dataset], folder: Path) -> None:
    """Every Dataset as an HDF5 file; those of an earlier call are replaced."""
    for name, dataset in found.items():
        path = folder / f"{name}.h5"
        path.unlink(missing_ok=True)
        dy.results.save(dataset, path)


if __name__ == "__main__":
    main()
