"""What sweeps are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xarray as xr

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryWriter
from dynamics import measures, sites, steps
from dynamics.config import (
    AliasConfig,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    PrimaryConfig,
    StudyConfig,
    ToyConfig,
)
from dynamics.patching import (
    patch_gradients,
    patch_signals,
)
from dynamics.recipe import Contrast
from dynamics.tasks import AliasTask

STEPS = [8, 9, 10]
"""In X2; 9 lies between stored checkpoints."""


def trained(folder: Path, seed: int) -> Trajectory:
    """A run of twelve steps with every second checkpoint stored."""
    phase = PhaseConfig(4)
    config = StudyConfig(
        task=AliasConfig(modulus=8, multipliers=(2, 3), train_multipliers=1),
        model=ToyConfig(n_heads=2, d_model=8, d_head=4, d_mlp=8, n_layers=1),
        phases=PhasesConfig(pretrain=phase, x1=phase, x2=phase, batch_size=8),
        patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
        seed=seed,
    )
    task = AliasTask(config)
    recipe = task.recipe()
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    state = Checkpoint.capture(recipe.model, optimizer, recipe.build_scheduler(optimizer), 0)
    with TrajectoryWriter.create(folder, config.to_dict()) as writer:
        for step in range(0, 13, 2):
            state = steps.advance(recipe, state, step, task.batch)
            writer.append(state)
    return Trajectory.open(folder)


def alone(task: AliasTask, step: int) -> list[Contrast]:
    return task.contrasts()


def counted(recipe, checkpoint, contrasts, sites, measure, calls: Path, verb=patch_gradients) -> xr.Dataset:
    """A verb that writes a line for every contrast it is given."""
    with calls.open("a") as file:
        file.writelines(f"{checkpoint.step} {contrast.coords['example']}\n" for contrast in contrasts)
    return verb(recipe, checkpoint, contrasts, sites, measure)


def patch_signals_at(recipe, checkpoint, contrasts, sites, measure, forward) -> xr.Dataset:
    places = dy.sites.activations(recipe.model, "blocks.*.hook_resid_pre")
    return patch_signals(recipe, checkpoint, contrasts, places, measure, forward)


def lines(calls: Path) -> int:
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def swept(verb, run, steps=STEPS, **settings: Any) -> xr.Dataset:
    return dy.sweep(verb, run, steps, alone, sites.heads, measures.correct_logit, **settings)
