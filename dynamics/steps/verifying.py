"""Verifying a recorded run: its files by their checksums, its steps by taking them again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from checkpoints import Checkpoint, Trajectory, index, store
from dynamics import results
from dynamics.recipe import Recipe
from dynamics.steps.replaying import advance


@dataclass(frozen=True)
class Verdict:
    """What replaying from one stored checkpoint to the next showed.

    Attributes:
        start, stop: the two steps.
        differences: names of what is not bitwise equal; empty where everything is.
    """

    start: int
    stop: int
    differences: tuple[str, ...]


@dataclass(frozen=True)
class FileReport:
    """What the files of a run's folder say about themselves.

    Attributes:
        checked: those that carry a checksum, below the run's folder.
        unchecked: those that carry none: figures, logs and notes, and whatever older versions wrote.
        problems: what is wrong with those that were checked, in words; empty where nothing is.
    """

    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    problems: tuple[str, ...]


def verify_files(run: Trajectory) -> FileReport:
    """Check every file of a run: checkpoints, files beside them, and results wherever in its folder they lie.

    The manifest and the index were checked when the run was opened. Hidden files are left out.
    """
    problems = run.verify()
    unchecked: list[str] = []
    checked = [*(entry.file for entry in store.read_manifest(run.path).entries), *run.files]
    known = {*checked, index.INDEX, *([store.MANIFEST] if run.sealed else [])}
    for path in sorted(path for path in run.path.rglob("*") if path.is_file()):
        name, sealed = path.relative_to(run.path).as_posix(), False
        if name in known or path.name.startswith("."):
            continue
        if path.suffix == ".h5" and not name.startswith(f"{store.TRAJECTORY}/"):
            try:
                sealed = results.verify(path)
            except (OSError, results.ResultsError) as error:
                problems.append(str(error))
                sealed = True
        (checked if sealed else unchecked).append(name)
    return FileReport(tuple(checked), tuple(unchecked), tuple(problems))


def verify(recipe: Recipe, run: Trajectory, batch_of: Callable[[int], Any]) -> Iterator[Verdict]:
    """Replay every pair of neighbouring checkpoints of a run and compare, bit for bit.

    Parameters, buffers, optimizer state, learning rates and the scheduler are compared. Where training began with
    a new optimizer, the replayed state drops its moments as training did.

    Bits are promised only where torch, the CPU's capability and the number of threads are those recorded
    in `checkpoint.fingerprint`; `environment_changes` says what differs.

    Args:
        recipe: how the run was trained; its model is not modified.
        run: its stored checkpoints.
        batch_of: the training batch of a step.

    Yields:
        One verdict for each pair of neighbours, in their order.

    Raises:
        RecipeError: the recipe does not fit the checkpoints.
        TrajectoryError: a file is damaged.
    """
    for start, stop in pairwise(run.steps):
        recorded = run.at(stop)
        replayed = advance(recipe, run.at(start), stop, batch_of)
        if recorded.begins_optimizer:
            replayed = replace(replayed.with_fresh_optimizer(), begins_optimizer=True)
        yield Verdict(start, stop, tuple(recorded.differences(replayed)))


def environment_changes(recorded: Checkpoint) -> list[str]:
    """What of the numeric environment differs here from the recorded one, in words.

    Deterministic kernels are left out: replaying turns them on where the run had them.
    """
    here = Checkpoint.capture(nn.Module()).fingerprint
    return [
        f"{name} was {value}, here {here.get(name)}"
        for name, value in recorded.fingerprint.items()
        if here.get(name) != value and name != "deterministic"
    ]
