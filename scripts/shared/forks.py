"""Runs of the alias study whose X2 is forked, roles of Dt3 and Df4 as drawn and exchanged: trained, and asked."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory
from dynamics.config import PatchingConfig, PrimaryConfig, ScheduleConfig, StudyConfig, read
from dynamics.tasks import AliasTask
from scripts.shared.runs import each, parser, run_key, stored

ROLES = ("drawn", "exchanged")
EXPLORED, CONFIRMED = range(400, 412), range(412, 424)
"""Seeds that analyses are made up on, and those that are opened once afterwards: docs/analyses/truth.md."""

Ask = Callable[[AliasTask, Trajectory], xr.Dataset]
Found = Mapping[int, Sequence[xr.Dataset]]
"""By seed what its forks say, in the order of the roles asked for."""


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


def fill(configs: Mapping[Path, StudyConfig], workers: int) -> list[str]:
    """What the forks of each folder hold, trained where they are not there."""
    return each(_forked, [(config, folder) for folder, config in configs.items()], workers, "seed")


def _forked(config: StudyConfig, folder: Path) -> str:
    return "; ".join(map(str, forked(config, folder).values()))


def command_line(description: str | None, out: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What those are told that ask the forks of scripts/experiments/runs.py; refused where too few are trained.

    What the seeds explored have settled is confirmed once, so --confirm wants every seed of both halves.
    """
    made = parser(description)
    made.add_argument("runs", type=Path, help="the folder that scripts/experiments/runs.py filled")
    made.add_argument("--out", type=Path, default=Path("runs") / out, help="where results are kept")
    made.add_argument("--workers", type=int, default=1, help="processes")
    made.add_argument(
        "--explore", type=int, default=len(EXPLORED), help="look at so many of the seeds explored"
    )
    made.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES, help="forks of each seed to ask")
    made.add_argument("--confirm", action="store_true", help="open the seeds that confirm; once, at the end")
    given = made.parse_args(arguments)
    if not trained(given.runs, EXPLORED):
        made.error(
            f"none of {_named(EXPLORED)} is trained in {given.runs}; scripts/experiments/runs.py does it."
        )
    every = {*EXPLORED, *CONFIRMED}
    if given.confirm and (missing := every - {*trained(given.runs, every)}):
        made.error(
            f"{_named(missing)} are not trained to their end in {given.runs}; --confirm is for when all "
            f"{len(every)} are. scripts/experiments/runs.py trains them."
        )
    return given


def trained(folder: Path, seeds: Iterable[int]) -> list[int]:
    """The seeds of which both forks are there, trained to their end."""

    def ended(fork: Path) -> bool:
        if not fork.exists():
            return False
        run = Trajectory.open(fork)
        return run.steps[-1:] == (read(run.config).phases.starts["end"],)

    return [seed for seed in seeds if all(ended(folder / f"seed-{seed}" / role) for role in ROLES)]


def asked(ask: Ask, given: argparse.Namespace, part: str = "") -> tuple[Found, Found]:
    """What each fork says, of the seeds explored and, with --confirm, of the rest; `of_seeds` says how."""
    explored = of_seeds(ask, given, EXPLORED[: given.explore], part)
    return explored, of_seeds(ask, given, CONFIRMED, part) if given.confirm else {}


def of_seeds(ask: Ask, given: argparse.Namespace, seeds: Iterable[int], part: str = "") -> Found:
    """What each fork of the trained seeds says, from files where it is there; of a part, in a folder of its own."""
    there = trained(given.runs, seeds)
    roles = given.roles
    jobs = [(ask, given.runs / f"seed-{seed}" / role, given.out / part) for seed in there for role in roles]
    found = each(_of_fork, jobs, given.workers)
    return {seed: found[len(roles) * i : len(roles) * (i + 1)] for i, seed in enumerate(there)}


def seeds_said(explored: Found, confirming: Found) -> str:
    """Which seeds a table is about, which it leaves out, and how many forks of each were asked."""
    forks = {len(of_seed) for of_seed in (*explored.values(), *confirming.values())}
    each_seed = "the mean of both forks" if forks == {len(ROLES)} else "one fork"
    missing = {*EXPLORED} - {*explored} | ({*CONFIRMED} - {*confirming} if confirming else set())
    return (
        f"{len(explored)} seeds explored, {len(confirming) or 'none yet'} that confirm, each {each_seed}"
        + (f"; without {_named(missing)}" if missing else "")
    )


def _named(seeds: Iterable[int]) -> str:
    return f"seeds {', '.join(map(str, sorted(seeds)))}"


def _of_fork(ask: Ask, folder: Path, out: Path) -> xr.Dataset:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run = Trajectory.open(folder)
    return stored(out / f"{run_key(run)}.h5", partial(ask, dy.tasks.aliases.load(run.config), run))
