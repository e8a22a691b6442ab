"""Verifying a recorded run: its files by their checksums, its steps by taking them again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from checkpoints import Checkpoint, Trajectory, index, shared, store
from dynamics import results
from dynamics.recipe import ByNorm, Recipe
from dynamics.steps.replaying import advance
from dynamics.steps.states import assign_rates


@dataclass(frozen=True)
class Verdict:
    """What replaying from one stored checkpoint to the next showed.

    Attributes:
        start, stop: the two steps.
        differences: names of what is not bitwise equal; empty where everything is.
        cause: which of the usual causes explains them, and what to change: with it the replay is the same bits.
            None where nothing differs, or none does.
    """

    start: int
    stop: int
    differences: tuple[str, ...]
    cause: str | None = None


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
    entries = store.read_manifest(run.path).entries
    checked = [*(entry.file for entry in entries), *shared.names(run.path), *run.files]
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

    Parameters, buffers, optimizer state, learning rates and the scheduler are compared; rates that the recipe's
    `learning_rate` assigns are those of the step that comes next on both sides. Where training began with a new
    optimizer, the replayed state drops its moments as training did. Of a step that differs the usual causes are
    tried: the learning rate, what clipping counts, None or zero as the gradient of what is unused, train or eval
    mode, and the batch of a step before or after.

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
    each_once = map(run.at, run.steps)
    for (start, stop), (before, recorded) in zip(pairwise(run.steps), pairwise(each_once), strict=True):
        differences = _differences(recipe, before, recorded, batch_of)
        cause = _cause(recipe, before, recorded, batch_of) if differences else None
        yield Verdict(start, stop, differences, cause)


def _differences(
    recipe: Recipe, before: Checkpoint, recorded: Checkpoint, batch_of: Callable[[int], Any]
) -> tuple[str, ...]:
    replayed = advance(recipe, before, recorded.step, batch_of)
    if recorded.begins_optimizer:
        replayed = replace(replayed.with_fresh_optimizer(), begins_optimizer=True)
    return tuple(_at_next_rates(recipe, recorded).differences(_at_next_rates(recipe, replayed)))


def _at_next_rates(recipe: Recipe, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the rates that the recipe assigns before its step, be it taken before that or after."""
    if checkpoint.optimizer is None:
        return checkpoint
    groups = tuple(map(dict, checkpoint.optimizer.groups))
    assign_rates(recipe, groups, checkpoint.step)
    return replace(checkpoint, optimizer=replace(checkpoint.optimizer, groups=groups))


def _cause(
    recipe: Recipe, before: Checkpoint, recorded: Checkpoint, batch_of: Callable[[int], Any]
) -> str | None:
    """The first of the usual causes with which the replay has the recorded parameters, buffers and moments."""
    for words, other, state, batches in _usual_causes(recipe, before, recorded, batch_of):
        try:
            differences = _differences(other, state, recorded, batches)
        except LookupError:  # no batch lies before the first, or after the last
            continue
        if all(name.startswith(("scheduler", "optimizer/groups")) for name in differences):
            return words
    return None


def _usual_causes(
    recipe: Recipe, before: Checkpoint, recorded: Checkpoint, batch_of: Callable[[int], Any]
) -> Iterator[tuple[str, Recipe, Checkpoint, Callable[[int], Any]]]:
    """Each in words, with the recipe, the state and the batches that it would mean."""
    if recorded.optimizer is not None:
        rates = [group["lr"] for group in recorded.optimizer.groups]
        numbers = ", ".join(f"{float(rate):.6g}" for rate in dict.fromkeys(rates))
        yield (
            f"the learning rate was {numbers}, as recorded after the step: give the recipe learning_rate="
            "step -> rate, or the scheduler that set it",
            replace(recipe, scheduler=None, learning_rate=lambda _: rates),
            before,
            batch_of,
        )
    if isinstance(recipe.clip, ByNorm):
        over: Literal["model", "optimizer"] = "optimizer" if recipe.clip.over == "model" else "model"
        clip = replace(recipe.clip, over=over)
        yield (
            f"clipping counted the {over}'s gradients: clip={clip}",
            replace(recipe, clip=clip),
            before,
            batch_of,
        )
    unused: Literal["skip", "coast"] = "coast" if recipe.unused == "skip" else "skip"
    gradient = "zero, and not None" if unused == "coast" else "None, and not zero"
    yield (
        f"parameters that a batch does not use had a gradient of {gradient}: unused={unused!r}",
        replace(recipe, unused=unused),
        before,
        batch_of,
    )
    for mode in ("train", "eval"):
        evaluating = tuple(name for name, _ in recipe.model.named_modules()) if mode == "eval" else ()
        yield (
            f"the model was in {mode} mode, which the checkpoint does not say: checkpoints are captured after "
            f"model.{mode}()",
            recipe,
            replace(before, evaluating=evaluating),
            batch_of,
        )
    for shift, which in ((1, "after it"), (-1, "before it")):
        if before.step + shift >= 0:
            yield (
                f"the batch was that of the step {which}",
                recipe,
                before,
                partial(_shifted, batch_of, shift),
            )


def _shifted(batch_of: Callable[[int], Any], shift: int, step: int) -> Any:
    return batch_of(step + shift)


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
