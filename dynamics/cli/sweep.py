"""Replay every asked step of runs with each site exchanged, by one process or many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dynamics.cli.parsing import Parser
from dynamics.cli.runs import open_trained
from dynamics.config import Level, MeasureName, OptimizerState, PatchingConfig, StudyConfig

if TYPE_CHECKING:
    from checkpoints import Trajectory

VERBS = ("patch_gradients", "patch_updates", "patch_factors", "attribute_step")
"""The verbs whose sites are parameters, which need no more than their label."""


def run(words: Sequence[str]) -> None:
    """`dynamics sweep RUN [RUN ...] --out FOLDER`."""
    given = _parser().parse_args(list(words))

    from checkpoints import Checkpoint
    from dynamics import attribution, patching, results, sweeps

    runs = [open_trained(folder, "a sweep needs") for folder in given.runs]
    config = sweeps.of_config(runs[0]).config
    optimizers = given.optimizers or patching_of(config).optimizers
    stored = set.intersection(*(set(run.steps) for run in runs))
    *_, first, end = config.phases.starts.values()
    states = {"stored": sweeps.as_stored, "fresh": Checkpoint.with_fresh_optimizer}
    asked = sweeps.plan(
        getattr(patching, given.verb, None) or getattr(attribution, given.verb),
        runs[0] if len(runs) == 1 else runs,
        given.steps or sorted(stored & set(range(first, end))),
        *question(given, runs[0]),
        {name: states[name] for name in optimizers},
    )
    if given.dry_run:
        print(sweeps.estimate(asked, given.out, given.workers))
        return
    start = time.monotonic()
    found = sweeps.run(asked, given.out, given.workers, given.scheduler)
    path = given.out / f"{asked.name}.h5"
    if not path.exists():
        results.save(found, path)
    shape = ", ".join(f"{size} {dim}" for dim, size in found.sizes.items())
    print(
        f"{path}: {shape}. It took {sweeps.duration(time.monotonic() - start)} and "
        f"{sweeps.peak_megabytes():,.0f} MB in a process."
    )


def question(given: Any, run: Trajectory) -> tuple[Any, Any, Any]:
    """Contrasts, sites and measures that a sweep of a run is asked for; see `add_question`."""
    from dynamics import measures, sweeps
    from dynamics.sites import LEVELS

    default = patching_of(sweeps.of_config(run).config)
    levels, names = given.levels or default.levels, given.measures or default.measures
    return (
        lambda task, _: task.contrasts(),
        lambda model: [site for level in levels for site in LEVELS[level](model)],
        {name: measures.by_name(name) for name in names},
    )


def patching_of(config: Any) -> PatchingConfig:
    """What a run's config says of patching, or the alias study's where it says nothing."""
    return config.patching if isinstance(config, StudyConfig) else PatchingConfig()


def add_question(parser: Parser) -> None:
    """Add the options `--levels` and `--measures`."""
    add_patching(parser, "levels", get_args(Level))
    add_patching(parser, "measures", get_args(MeasureName))


def add_patching(parser: Parser, name: str, known: Sequence[str]) -> None:
    """Add an option whose default stands in the run's config."""
    parser.add_argument(
        f"--{name}",
        choices=known,
        nargs="+",
        help=f"default: patching.{name} of the run's config, or of the alias study's",
    )


def _parser() -> Parser:
    parser = Parser(
        prog="dynamics sweep",
        usage="dynamics sweep RUN [RUN ...] --out FOLDER [--verb NAME] [--steps N ...] [--levels LEVEL ...]\n"
        "         [--measures NAME ...] [--optimizers stored|fresh ...] [--workers N | --scheduler ADDRESS] "
        "[--dry-run]",
        description="Replay every asked step of runs with each site exchanged, for every held-out alias, or every "
        "contrast of a small language. What is done is kept in FOLDER; the same command goes on from there.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs; several become a dim `seed`"
    )
    parser.add_argument("--out", type=Path, required=True, help="where results are kept; sweeps may share it")
    parser.add_argument("--verb", choices=VERBS, default="patch_gradients", help="what is exchanged")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        help="steps of the run; default: all of the last phase that are stored",
    )
    add_question(parser)
    add_patching(parser, "optimizers", get_args(OptimizerState))
    parser.add_argument("--workers", type=int, default=0, help="processes to start; 0 works in this one")
    parser.add_argument("--scheduler", type=str, help="a running dask cluster: its address or scheduler file")
    parser.add_argument(
        "--dry-run", action="store_true", help="try one unit of work, and say what all will take"
    )
    return parser
