"""Runs of the alias study whose X2 is forked: with the roles of Dt3 and Df4 as drawn, and exchanged."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch

import dynamics as dy
from checkpoints import Trajectory
from dynamics.config import PatchingConfig, PrimaryConfig, ScheduleConfig, StudyConfig

ROLES = ("drawn", "exchanged")


def sparse(config: StudyConfig) -> StudyConfig:
    """The config, keeping few checkpoints: those in between are replayed."""
    return replace(
        config,
        schedule=ScheduleConfig(per_decade=1, dense=0, evaluate_every=config.schedule.evaluate_every),
        patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
    )


def forked(config: StudyConfig, folder: Path) -> dict[str, Trajectory]:
    """Both forks, by role, trained into folders of that name or gone on with: X1 once, X2 from its end twice.

    Averages over both cancel the luck of which aliases were drawn into which set.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    runs: dict[str, Trajectory] = {}
    for role in ROLES:
        of_role = replace(config, task=replace(config.task, x2_roles=role))
        start = runs["drawn"].at(config.phases.starts["x2"]) if runs else None
        runs[role] = dy.training.fit(of_role, folder / role, start=start)
    return runs
