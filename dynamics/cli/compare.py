"""Say what changed between two steps of a run, or along all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynamics.cli.parsing import CommandError, Parser
from dynamics.cli.runs import open_trained, set_threads_of


def run(words: Sequence[str]) -> None:
    """`dynamics compare RUN --from STEP --to STEP`, or `--every`."""
    parser = Parser(
        prog="dynamics compare",
        usage="dynamics compare RUN --from STEP --to STEP\n       dynamics compare RUN --every [--steps N ...]",
        description="What changed between two steps of a run, or along all of it: tables here, Datasets in "
        "RUN/results, figures in RUN/figures.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--from", type=int, help="a step of the run, stored or not")
    parser.add_argument("--to", type=int, help="another")
    parser.add_argument("--every", action="store_true", help="every checkpoint and its neighbour")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="with --every: these; default: all that are stored"
    )
    given = parser.parse_args(list(words))

    pair = given["from"], given.to
    if (
        given.every == (None not in pair)
        or (None in pair and pair != (None, None))
        or (given.steps and not given.every)
    ):
        raise CommandError("give --from STEP and --to STEP, or --every (with --steps, if not all).")
    from dynamics import studies

    trajectory = open_trained(given.run, "its task is not known, and a comparison needs")
    set_threads_of(trajectory)
    compared = (
        studies.compare_every(trajectory, given.steps)
        if given.every
        else studies.compare_pair(trajectory, *pair)
    )
    print(f"{compared.table}\n\nDatasets are in {compared.results}, figures in {compared.figures}.")
