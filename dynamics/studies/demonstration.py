"""A demonstration in two minutes: which parts of a small model does one new fact go into, in one optimizer step?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from dynamics import measures, plots, results, sites, statistics, steps, tasks, training
from dynamics.config import FactsConfig, FactsRun, LatePhasesConfig, PhaseConfig, ScheduleConfig, ToyConfig
from dynamics.patching import patch_gradients

RUN = FactsRun(
    task=FactsConfig(n_subjects=40, n_late=16),
    model=ToyConfig(n_layers=2, n_heads=4, d_model=64, d_head=16, d_mlp=128, n_ctx=5),
    phases=LatePhasesConfig(
        learn=PhaseConfig(steps=240, warmup=20, learning_rate=3e-3),
        late=PhaseConfig(steps=40, learning_rate=3e-3),
    ),
    schedule=ScheduleConfig(per_decade=2, dense=4),
)


@dataclass(frozen=True)
class Demonstration:
    """What a demonstration left: its run's folder, its figure, its table in words."""

    folder: Path
    figure: Path
    table: str


def demonstrate(out: str | os.PathLike[str], config: FactsRun = RUN) -> Demonstration:
    """Train a small transformer on facts, then take one step on new ones again part by part and draw the effects.

    The step states capitals for the first time. Base: another capital stands in the place of one of them.
    Source: the batch as it was. Probe: questions about the capital in other words.

    Args:
        out: the run's folder; called again, it trains nothing anew.
        config: of the run.

    Raises:
        RunError: the folder holds something else.
    """
    folder = Path(out)
    run = training.fit(config, folder)
    task = tasks.facts.FactsTask(config)
    recipe, step = task.recipe(), config.phases.starts["late"] + 1
    state = steps.reach(recipe, run, step, task.batch)
    effects = patch_gradients(
        recipe,
        state.with_fresh_optimizer(),
        task.statements_at(step),
        sites.components(recipe.model),
        measures.correct_log_prob,
    )
    summary: xr.Dataset = statistics.summarize(effects)
    results.save(effects, folder / "results" / "demo.h5", overwrite=True)
    figure = folder / "figures" / "demo.png"
    provenance = {"provenance": str(effects.attrs["provenance"])}
    plots.save(plots.recoveries(summary), figure, provenance)
    return Demonstration(folder, figure, statistics.table(summary))
