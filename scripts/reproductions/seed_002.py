"""Gradient patching, step by step, of aliases (seed 002). About 2 minutes.

As the notebook of seed 002 has it, on a run of the alias task: two checkpoints, accuracy per integer before
and after, the integer that changed most, single replays, the normalised metric by layer (the backward signal
alone, and with the activation), by parameters up to a layer, by position, component and head. The notebook's
first checkpoint is the one before X2; here it is ten steps later, where the two definitions differ over all
aliases (`--first 0` for the notebook's).

    .venv/bin/python scripts/reproductions/seed_002.py runs/aliases
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import xarray as xr

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.reproductions.subjects import draw
from scripts.shared.into_readme import interval

LOGIT = dy.measures.correct_logit


def per_integer(recipe: Recipe, task: dy.tasks.AliasTask, state: Checkpoint, measure=dy.measures.accuracy):  # type: ignore[no-untyped-def]
    """The measure on each held-out integer's own questions, by set."""
    model = task.model()
    state.restore(model)
    with torch.no_grad():
        return {
            name: {i: float(measure(model.eval(), task.questions(i)).mean()) for i in task.sets[name]}
            for name in ("Dt3", "Df4")
        }


def normalised(found: xr.Dataset, title: str) -> None:
    """(patched − unreliable) / (reliable − unreliable) of one alias, site by site."""
    gap = float(found["source"][0] - found["base"][0])
    print(f"\n{title}\n  {'no step at all':24} {float(found['untouched'][0] - found['base'][0]) / gap:+.4f}")
    shares = dy.statistics.pairwise_recovery(found).values[0]
    for site, share in zip(found["site"].values, shares, strict=True):
        print(f"  {site:24} {share:+.4f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/aliases"))
    parser.add_argument("--first", type=int, default=10, help="step of X2 of the first checkpoint")
    parser.add_argument("--later", type=int, default=500, help="steps from it to the second")
    parser.add_argument("--out", type=Path, default=Path("runs") / "seeds")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    run = Trajectory.open(given.run)
    task = dy.tasks.aliases.load(run.config)
    recipe, starts = task.recipe(), task.config.phases.starts
    first = starts["x2"] + given.first
    later = min(first + given.later, starts["end"])
    before, after = (dy.steps.reach(recipe, run, step, task.batch) for step in (first, later))

    # accuracy per integer before and after, and the integer that changed most
    accuracy = [per_integer(recipe, task, state) for state in (before, after)]
    for name in ("Dt3", "Df4"):
        print(f"{name}, accuracy at step {before.step} -> {after.step}")
        print(
            "  "
            + "  ".join(f"{i}: {accuracy[0][name][i]:.2f} -> {a:.2f}" for i, a in accuracy[1][name].items())
        )
    change = {i: abs(accuracy[1]["Dt3"][i] - a) for i, a in accuracy[0]["Dt3"].items()}
    chosen = max(change, key=lambda i: change[i])
    print(f"integer with the largest change: {chosen}, {change[chosen]:.2f}")
    for state in (before, after):
        print(
            f"  correct logit at step {state.step}: {per_integer(recipe, task, state, LOGIT)['Dt3'][chosen]:.2f}"
        )

    # one step on the reliable and one on the unreliable definition, with a new optimizer and with the run's
    contrasts = task.contrasts()
    (one,) = [c for c in contrasts if c.coords["integer"] == chosen]
    whole = [dy.sites.everything(recipe.model)]
    fresh = before.with_fresh_optimizer()
    for words, state in (("a new AdamW", fresh), ("the run's own", before)):
        for label, which in ((f"alias {chosen}", [one]), ("all aliases", contrasts)):
            steps = dy.patch_gradients(recipe, state, which, whole, LOGIT)
            values = [steps[name].values for name in ("untouched", "source", "base")]
            shown = [f"{v[0]:.2f}" if len(v) == 1 else interval(v) for v in values]
            print(f"{words}, {label}: no step {shown[0]}, reliable {shown[1]}, unreliable {shown[2]}")

    # layer by layer: the residual stream's signal, alone and with the activation it belongs to
    like = one.base
    by_layer = dy.sites.activations(recipe.model, "blocks.*.hook_resid_pre", by=("layer",))
    signals = dy.patch_signals(recipe, fresh, [one], by_layer, LOGIT)
    normalised(signals, "resid_pre, backward signal alone")
    both = dy.patch_signals(recipe, fresh, [one], by_layer, LOGIT, forward="source")
    normalised(both, "resid_pre, forward and backward")
    up_to = dy.patch_gradients(recipe, fresh, [one], dy.sites.up_to_layer(recipe.model), LOGIT)
    normalised(up_to, "gradients of all parameters up to a layer")

    # what the notebook asks in the end: a position, a head
    by_pos = dy.sites.activations(recipe.model, "blocks.*.hook_resid_pre", by=("layer", "pos"), like=like)
    by_head = dy.sites.activations(recipe.model, "blocks.*.attn.hook_z", by=("layer", "head"), like=like)
    positions = dy.patch_signals(recipe, fresh, [one], by_pos, LOGIT)
    normalised(positions, "resid_pre, backward signal, by position")
    normalised(dy.patch_signals(recipe, fresh, [one], by_head, LOGIT), "z, backward signal, by head")

    # the same over all aliases, with intervals
    figures = {}
    for name, call in {
        "signals_by_head": lambda: dy.patch_signals(recipe, fresh, contrasts, by_head, LOGIT),
        "gradients_by_head": lambda: dy.patch_gradients(
            recipe, fresh, contrasts, dy.sites.heads(recipe.model), LOGIT
        ),
        "gradients_by_component": lambda: dy.patch_gradients(
            recipe, fresh, contrasts, dy.sites.components(recipe.model), LOGIT
        ),
    }.items():
        found = call()
        summary = dy.statistics.summarize(found)
        print(f"\n{name}\n{dy.statistics.table(summary, 8)}")
        figures[name] = dy.plots.heatmap(summary) if "head" in name else dy.plots.recoveries(summary)
    tokens = ["reliable or not", f"alias {chosen}", str(chosen), "padding"]
    draw(given.out / "002", signals_by_position=dy.plots.tiles(positions, x_labels=tokens), **figures)


if __name__ == "__main__":
    main()
