"""Units of work: one run, one step or two, one optimizer state, a group of contrasts."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr

from checkpoints import Checkpoint, CheckpointPair, Trajectory, store
from checkpoints.rng import replayed
from dynamics import results, steps
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site
from dynamics.sweeps.digests import digest, sources
from dynamics.sweeps.errors import SweepError

Verb = Callable[..., xr.Dataset]
State = Callable[[Checkpoint], Checkpoint]


class Task(Protocol):
    """What a sweep must know of a run beside its checkpoints."""

    def recipe(self) -> Recipe:
        """How a step of the run is taken."""

    def batch(self, step: int) -> Any:
        """The training batch of a step; asked only for steps that lie between stored checkpoints."""


@dataclass(frozen=True)
class Question:
    """What is asked of one run, at whatever step.

    Attributes:
        key: tells this question from others in the process; all else follows from it.
        verb, sites, measure: as `sweep` was called.
        run: its folder is an absolute path.
        task_of: run -> task; called again wherever the question is worked on.
        dims: what the sweep's Dataset has and no verb's result may have.
        threads: how many to compute with where a checkpoint does not say with how many it was trained.
        source: the same of the run that source checkpoints are of, where that is another.
    """

    key: str
    verb: Verb = field(compare=False)
    run: Trajectory = field(compare=False)
    task_of: Callable[[Trajectory], Task] = field(compare=False)
    sites: tuple[Site, ...] = field(compare=False)
    measure: Measure | Mapping[str, Measure] = field(compare=False)
    dims: frozenset[str] = field(compare=False)
    threads: int = field(compare=False)
    source: Question | None = field(compare=False, default=None)

    @cached_property
    def identity(self) -> str:
        """A hash of all that the numbers depend on beside checkpoint and contrasts; not of where the run lies."""
        with replayed(None):
            recipe = self.task_of(self.run).recipe()
        model = recipe.model
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return digest(
            self.verb,
            self.task_of,
            self.run.config,
            self.sites,
            self.measure,
            (recipe.loss, recipe.optimizer, recipe.scheduler, recipe.clip),
            (recipe.learning_rate, recipe.unused, recipe.accumulate, recipe.scaler),
            (
                repr(model),
                [type(module) for module in model.modules()],
                [_settings(m) for m in model.modules()],
            ),
            [(name, t.shape, t.dtype) for name, t in tensors],
            [sources(), torch.__version__, np.__version__, platform.python_version()],
        )

    def expect(self, found: xr.Dataset) -> xr.Dataset:
        """What the verb returned, or a SweepError where it would not fit into the sweep."""
        dims = set(map(str, found.dims))
        if "example" not in dims:
            raise SweepError(f"{in_words(self.verb)} returned the dims {sorted(dims)}; expected 'example'.")
        own = {"step"} if results.is_account(found) else set()
        if taken := sorted(self.dims & dims - own):
            raise SweepError(
                f"{in_words(self.verb)} has a dim '{taken[0]}' of its own, so it cannot be swept along another. "
                f"Give one {taken[0]} by itself, not in a list."
            )
        return found

    @cached_property
    def files(self) -> dict[int, str]:
        """The checksum of each stored checkpoint, by step."""
        return {entry.step: entry.sha256 for entry in store.read_manifest(self.run.path).entries}


@dataclass(frozen=True)
class Unit:
    """One question at one step and in one optimizer state, of a group of contrasts.

    Attributes:
        question: what is asked.
        step: where.
        state: what is made of the checkpoint before the verb is called.
        contrasts: which.
        source_step: of the source checkpoint, where the verb is asked of a pair; None where of one checkpoint.
    """

    question: Question
    step: int
    state: State
    contrasts: tuple[Contrast, ...]
    source_step: int | None = None

    @cached_property
    def identity(self) -> str:
        """A hash of everything the unit's numbers depend on."""
        stretches = [(_start_of(self.question, self.step), self.step)]
        if self.source_step is not None:
            stretches.append((_start_of(self._source, self.source_step), self.source_step))
        other = [] if self.question.source is None else [self.question.source.identity]
        return digest(self.question.identity, stretches, self.state, self.contrasts, *other)

    @property
    def _source(self) -> Question:
        """What is asked of the run that source checkpoints are of."""
        return self.question.source or self.question

    @property
    def replays(self) -> int:
        """Contrasts times sites."""
        return len(self.contrasts) * len(self.question.sites)

    def compute(self) -> xr.Dataset:
        """What the verb returns, with as many threads as the run was trained with; one unit at a time in a process.

        Verbs exchange the global random numbers while they work, so two at once would draw each other's.
        """
        with _ALONE:
            try:
                recipe, checkpoint = reached(self.question, self.step)
                base = self.state(checkpoint)
                given: Checkpoint | CheckpointPair = base
                if self.source_step is not None:
                    source = reached_source(self._source, self.source_step)
                    given = CheckpointPair(base, self.state(source))
                with _threads(self.question, checkpoint):
                    found = self.question.verb(
                        recipe,
                        given,
                        list(self.contrasts),
                        list(self.question.sites),
                        self.question.measure,
                    )
                return self.question.expect(found)
            except Exception as error:
                of = "" if self.question.source is None else f" of {self.question.source.run.path}"
                into = "" if self.source_step is None else f" {self.source_step}{of} into"
                error.add_note(f"This was at step{into} {self.step} of {self.question.run.path}.")
                raise


@lru_cache(maxsize=1)
def reached(question: Question, step: int) -> tuple[Recipe, Checkpoint]:
    """The run's recipe and its checkpoint at a step, kept until another is asked for."""
    return _reach(question, step)


@lru_cache(maxsize=1)
def reached_source(question: Question, step: int) -> Checkpoint:
    """The source checkpoint of a pair, kept beside its base until another is asked for."""
    return _reach(question, step)[1]


def forget() -> None:
    """Let go of the checkpoints that are kept."""
    reached.cache_clear()
    reached_source.cache_clear()


def _reach(question: Question, step: int) -> tuple[Recipe, Checkpoint]:
    start = question.run.before(step)
    with start.random_state(), _threads(question, start):
        task = question.task_of(question.run)
        recipe = task.recipe()
        return recipe, steps.advance(recipe, start, step, lambda n: task.batch(n))


def _start_of(question: Question, step: int) -> str:
    """The checksum of the stored checkpoint that a step is reached from."""
    return question.files[max(stored for stored in question.files if stored <= step)]


_ALONE = threading.Lock()


@contextmanager
def _threads(question: Question, checkpoint: Checkpoint) -> Iterator[None]:
    """As many threads as the checkpoint was recorded with, which is when bits are promised."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(checkpoint.fingerprint.get("threads", question.threads)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """A module's own plain attributes, such as whether it trains."""
    return {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}


def in_words(value: Any) -> str:
    """A function by its name and settings, anything else as it is written."""
    if isinstance(value, partial):
        settings = [*map(in_words, value.args), *(f"{k}={in_words(v)}" for k, v in value.keywords.items())]
        return f"{in_words(value.func)}({', '.join(settings)})"
    return str(getattr(value, "__name__", repr(value)))
