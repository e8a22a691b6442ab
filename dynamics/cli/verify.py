"""Check every file of a run and replay every stored neighbour, bit by bit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dynamics.cli.parsing import Parser
from dynamics.cli.runs import set_threads_of
from dynamics.config import task_name


def run(words: Sequence[str]) -> None:
    """`dynamics verify RUN`; exits with 1 where a file is damaged or a replay differs."""
    parser = Parser(
        prog="dynamics verify",
        usage="dynamics verify RUN",
        description="Check every file of a run by its checksum - checkpoints, manifest, metrics, config, results - "
        "and replay every stored neighbour, bit by bit. Of a run whose task "
        "is not one of this toolkit the files alone are checked.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    folder = parser.parse_args(list(words)).run

    from tqdm.auto import tqdm

    from checkpoints import Trajectory
    from dynamics import steps, studies

    trajectory = Trajectory.open(folder)
    files = steps.verify_files(trajectory)
    for problem in files.problems:
        print(problem)
    if files.problems:
        sys.exit(1)
    print(f"{len(files.checked)} files match their checksums.")
    if files.unchecked:
        print(f"note: {len(files.unchecked)} carry none and are unchecked: {', '.join(files.unchecked)}")
    if "imported" in trajectory.provenance:
        print("They were imported, so there are no batches to replay.")
        return
    if task_name(trajectory.config) is None:
        print(
            "The config names no task of this toolkit, so a replay needs the recipe of the training loop:\n"
            "dynamics.steps.verify(recipe, run, batch_of) replays every stored neighbour."
        )
        return
    set_threads_of(trajectory)
    for change in studies.environment_changes(trajectory.last):
        print(f"note: {change}; bits are promised only where nothing differs")
    verdicts = list(
        tqdm(studies.verify(trajectory), total=len(trajectory) - 1, desc="replaying", unit="pair", delay=5)
    )
    different = [verdict for verdict in verdicts if verdict.differences]
    for verdict in different:
        names = ", ".join(verdict.differences[:5])
        print(
            f"step {verdict.start} replayed to {verdict.stop} differs in {len(verdict.differences)}: {names}"
        )
        if verdict.cause:
            print(f"  explained: {verdict.cause}")
    print(f"{len(verdicts) - len(different)} of {len(verdicts)} stored neighbours replay bit for bit.")
    if different:
        sys.exit(1)
