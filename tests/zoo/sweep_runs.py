"""What sweeps are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xarray as xr

import dynamics as dy
from dynamics import measures, sites
from dynamics.patching import (
    patch_gradients,
    patch_signals,
)
from dynamics.recipe import Contrast
from dynamics.tasks import AliasTask
from tests.zoo.comparison_models import short_run

STEPS = [8, 9]
"""In X2; 9 lies between stored checkpoints."""

trained = short_run
"""(folder, seed) -> a run of twelve steps with every second checkpoint stored."""


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
