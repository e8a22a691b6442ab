"""What every task is: rows by phase, batches by step, a model and how it is trained, contrasts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LambdaLR

from dynamics.batch import Batch
from dynamics.config import RunConfig
from dynamics.measures import cross_entropy, cross_entropy_in_bf16
from dynamics.models.toy import ToyTransformer
from dynamics.randomness import generator
from dynamics.recipe import ByNorm, Contrast, Recipe


class Task(ABC):
    """The data of one run. Everything is a pure function of the config; tasks of equal config are interchangeable.

    Attributes:
        config: the run's config.
        d_vocab: number of tokens.
    """

    config: RunConfig
    d_vocab: int

    def __repr__(self) -> str:
        phases = ", ".join(f"{name} {phase.steps}" for name, phase in self.config.phases.by_name.items())
        drawn = f"seed {self.config.seed}, {self.d_vocab} tokens, steps: {phases}"
        return f"{type(self).__name__}({drawn}; {self.config.task})"

    @abstractmethod
    def rows(self, phase: str) -> Batch:
        """All training rows of a phase."""

    @property
    @abstractmethod
    def evaluation(self) -> Mapping[str, Batch]:
        """What training is watched on, by name; `heldout` is what a phase may be ended early by."""

    @abstractmethod
    def contrasts(self) -> Sequence[Contrast]:
        """The task's pairs of batches, and what they are measured on."""

    @abstractmethod
    def sources(self, batch: Batch) -> list[str]:
        """Where each row of a training batch comes from, for `attribute_training`: labels, one for each row."""

    @lru_cache(maxsize=8)  # noqa: B019 - a task lives as long as its run
    def _order(self, phase: str, epoch: int) -> NDArray[np.int64]:
        return generator(self.config.order_seed, f"order {phase}", epoch).permutation(len(self.rows(phase)))

    def batch(self, step: int) -> Batch:
        """Training batch of a step: a pure function of (seeds, phase, step).

        A phase is a sequence of epochs, each its own permutation of the phase's rows, cut into batches
        that may straddle two epochs.
        """
        phase, local = self.config.phases.locate(step)
        rows = self.rows(phase)
        places = np.arange(local * self.config.phases.batch_size, (local + 1) * self.config.phases.batch_size)
        epochs, within = np.divmod(places, len(rows))
        index = np.concatenate([self._order(phase, int(e))[within[epochs == e]] for e in np.unique(epochs)])
        return rows[torch.from_numpy(index)]

    def batches(self, first: int, last: int) -> Sequence[Batch]:
        """The training batches of steps first to last − 1, each made when it is asked for."""
        return _Batches(self, range(first, last))

    def model(self) -> ToyTransformer:
        """The run's toy transformer, with the weights it starts from."""
        return ToyTransformer(replace(self.config.model, seed=self.config.weights_seed), self.d_vocab)

    def recipe(self) -> Recipe:
        """How the run's model is trained: cross-entropy, AdamW, clipping, learning rate by step.

        The optimizer's base learning rate is 1, so that the schedule's factor is the learning rate itself
        and one scheduler serves all phases.
        """
        phases = self.config.phases
        return Recipe(
            model=self.model(),
            loss=cross_entropy_in_bf16 if self.config.trainer.precision == "bf16-mixed" else cross_entropy,
            optimizer=partial(
                torch.optim.AdamW, lr=1.0, betas=phases.betas, weight_decay=phases.weight_decay
            ),
            scheduler=partial(LambdaLR, lr_lambda=phases.learning_rate),
            clip=ByNorm(phases.max_grad_norm, over="optimizer"),  # as Lightning, which trains it
        )


@dataclass(frozen=True)
class _Batches(Sequence[Batch]):
    """A task's batches of some steps, in order."""

    task: Task
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return replace(self, steps=self.steps[place])
        return self.task.batch(self.steps[place])
