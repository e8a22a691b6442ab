"""The main job: train the alias task, replay definitions, exchange gradients, and show where it matters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from checkpoints import Checkpoint, Trajectory
from dynamics import measures, plots, results, statistics, steps, tasks, training
from dynamics.comparison import over_training, score
from dynamics.config import PatchingConfig, StudyConfig
from dynamics.patching import patch_gradients, patch_updates
from dynamics.sites import LEVELS, Site
from dynamics.studies.findings import findings, limits
from dynamics.studies.late_accuracy import internalisation
from dynamics.tasks import AliasTask

VERBS: dict[str, Callable[..., xr.Dataset]] = {
    "patch_gradients": patch_gradients,
    "patch_updates": patch_updates,
}


@dataclass(frozen=True)
class Report:
    """What a study came to: where it lies, its primary table, and its findings in words."""

    folder: Path
    table: str
    findings: str


def run(config: StudyConfig, out: str | os.PathLike[str]) -> Report:
    """Train, patch, summarise, draw; go on where an earlier call with the same config stopped.

    Writes RUN/{config.yaml, manifest.json, trajectory/, metrics.csv, results/*.h5, figures/*.png,
    findings.md}. Results that exist are read, not computed again or overwritten.

    Raises:
        RunError: the folder holds another run.
    """
    out = Path(out)
    trajectory = training.fit(config, out)
    task = tasks.aliases.load(trajectory.config)
    effects = {name: _effects(task, trajectory, name, out / "results" / f"{name}.h5") for name in VERBS}
    _answers(task, trajectory, out / "results" / "answers.h5")
    summary = statistics.summarize(effects["patch_gradients"])
    metrics = pd.read_csv(BytesIO(trajectory.read_file("metrics.csv")))
    _draw(task, metrics, summary, out / "figures")
    chosen = primary(summary, task.config.patching, task)
    tables = [
        f"## {level}\n\n```\n{statistics.table(primary(summary, task.config.patching, task, level))}\n```"
        for level in task.config.patching.levels
    ]
    words = findings(task, internalisation(metrics, task.config.phases), summary, chosen)
    (out / "findings.md").write_text("\n\n".join([words, limits(task), *tables]) + "\n")
    return Report(out, statistics.table(chosen), words)


def primary(
    summary: xr.Dataset, patching: PatchingConfig, task: AliasTask, level: str | None = None
) -> xr.Dataset:
    """The one analysis the config named before anything was looked at; at another level, exploratory."""
    first = task.config.phases.starts["x2"]
    chosen = summary.sel(
        step=first + patching.primary.x2_step,
        optimizer=patching.primary.optimizer,
        measure=patching.primary.measure,
    )
    return chosen.isel(site=chosen["level"].values == (level or patching.primary.level))


def _effects(task: AliasTask, trajectory: Trajectory, verb: str, path: Path) -> xr.Dataset:
    """One verb over all held-out aliases, sites, replayed steps and optimizer states; kept in a file."""
    if path.exists():
        return results.load(path)
    patching = task.config.patching
    recipe = task.recipe()
    chosen = [site for level in patching.levels for site in LEVELS[level](recipe.model)]
    measured = {name: measures.by_name(name) for name in patching.measures}
    replayed = [task.config.phases.starts["x2"] + step for step in patching.x2_steps]

    def at(step: int, optimizer: str, sites: Sequence[Site]) -> xr.Dataset:
        checkpoint = steps.reach(recipe, trajectory, step, task.batch)
        if optimizer == "fresh":
            checkpoint = checkpoint.with_fresh_optimizer()
        return VERBS[verb](recipe, checkpoint, task.contrasts(), sites, measured)

    by_optimizer = [
        results.concat([at(step, optimizer, chosen) for step in replayed], "step", replayed)
        for optimizer in patching.optimizers
    ]
    effects = results.concat(by_optimizer, "optimizer", patching.optimizers)
    effects = effects.assign_coords(x2_step=("step", list(patching.x2_steps)))
    paths = json.loads(effects.attrs["provenance"])["paths"]
    effects.attrs["provenance"] = results.provenance(verb=verb, config=task.config.to_dict(), paths=paths)
    results.save(effects, path)
    return effects


def _answers(task: AliasTask, trajectory: Trajectory, path: Path) -> None:
    """What each alias's questions are answered at every stored checkpoint; kept in a file."""
    if path.exists():
        return
    recipe, (questions, coords) = task.recipe(), tasks.alias_questions(task)

    def asked(state: Checkpoint) -> dict[str, xr.Dataset]:
        return {"answers": score(recipe, state, questions, coords)}

    answers = over_training({1: asked}, trajectory, trajectory.steps, recipe, task.batch)["answers"]
    answers.attrs["provenance"] = results.provenance(quantity="score", config=task.config.to_dict())
    results.save(answers, path)


def _draw(task: AliasTask, metrics: pd.DataFrame, summary: xr.Dataset, folder: Path) -> None:
    """The study's figures; those whose sites were not asked for are left out."""
    patching, phases = task.config.patching, task.config.phases
    by_level: dict[str, Any] = {
        level: summary.sel(measure=patching.primary.measure).isel(site=summary["level"].values == level)
        for level in patching.levels
    }
    at = {"step": phases.starts["x2"] + patching.primary.x2_step, "optimizer": patching.primary.optimizer}
    starts = {name: step for name, step in phases.starts.items() if name != "end"}
    figures = {"accuracies": plots.accuracies(metrics, starts, task.chance())}
    level = patching.primary.level
    figures[level] = plots.recoveries(by_level[level].sel(at))
    figures["sites_by_step"] = plots.site_by_step(by_level[level].sel(optimizer=at["optimizer"]))
    if {"stored", "fresh"} <= set(patching.optimizers):
        figures["stored_and_fresh"] = plots.stored_and_fresh(by_level[level].sel(step=at["step"]))
    if "heads" in by_level:
        figures["heads"] = plots.heatmap(by_level["heads"].sel(at), x="head", y="layer")
    provenance = {"provenance": str(summary.attrs.get("provenance", ""))}
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.png", provenance)
