"""Runs of the alias study whose X2 is forked, roles of Dt3 and Df4 as drawn and exchanged: trained, and asked."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory
from dynamics.config import PatchingConfig, PrimaryConfig, ScheduleConfig, StudyConfig
from dynamics.tasks import AliasTask
from scripts.shared.runs import each, parser_of_runs, run_key, stored

ROLES = ("drawn", "exchanged")
EXPLORED, CONFIRMED = range(400, 412), range(412, 424)
"""Seeds that analyses are made up on, and those that are opened once afterwards: docs/analyses/truth.md."""

Ask = Callable[[AliasTask, Trajectory], xr.Dataset]


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


def parser_of_forks(description: str | None, out: str) -> argparse.ArgumentParser:
    """The command line of those that ask the forks of scripts/experiments/runs.py."""
    made = parser_of_runs(description, out, "the one folder that scripts/experiments/runs.py filled")
    made.add_argument("--workers", type=int, default=1, help="processes")
    made.add_argument("--confirm", action="store_true", help="open the seeds that confirm; once, at the end")
    return made


def asked(
    ask: Ask, given: argparse.Namespace
) -> tuple[dict[int, list[xr.Dataset]], dict[int, list[xr.Dataset]]]:
    """What each fork says, by seed, from files where it is there: seeds explored and, with --confirm, the rest."""
    (folder,) = given.runs

    def of_seeds(seeds: Iterable[int]) -> dict[int, list[xr.Dataset]]:
        there = [seed for seed in seeds if (folder / f"seed-{seed}").exists()]
        jobs = [(ask, folder / f"seed-{seed}" / role, given.out) for seed in there for role in ROLES]
        found = each(_of_fork, jobs, given.workers)
        return {seed: found[len(ROLES) * i : len(ROLES) * (i + 1)] for i, seed in enumerate(there)}

    return of_seeds(EXPLORED), of_seeds(CONFIRMED) if given.confirm else {}


def _of_fork(ask: Ask, folder: Path, out: Path) -> xr.Dataset:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run = Trajectory.open(folder)
    return stored(out / f"{run_key(run)}.h5", partial(ask, dy.tasks.aliases.load(run.config), run))
