"""Recording the trajectory of a Hugging Face Trainer, and the batches of its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from checkpoints import Checkpoint, TrajectoryWriter
from checkpoints.rng import replayed
from dynamics.models.trainers import COUNT, ITEMS
from dynamics.recipe import RecipeError


class HuggingFaceRecorder(TrainerCallback):
    """Appends the state before each of the given steps; the state training ends with counts as well.

    A step is one of the optimizer's, `state.global_step`; of accumulated batches the state before the first counts.
    Nothing is changed in the model or the Trainer, which puts the model into train mode before every batch: so it
    is recorded. A Trainer draws from torch's generator where an epoch begins: a replay with dropout goes as far as
    the epoch does.

    Args:
        writer: where checkpoints go; the caller opens and closes it.
        steps: which steps are kept, as `checkpoints.schedule` makes them.
    """

    def __init__(self, writer: TrajectoryWriter, steps: Iterable[int]) -> None:
        self.writer = writer
        self.steps = frozenset(steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the state before this step if it is one of those kept."""
        self._record(state.global_step, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the final state if it is one of those kept."""
        self._record(state.global_step, **kwargs)

    def _record(self, step: int, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any) -> None:
        if step not in self.steps or step in self.writer.steps:
            return
        own = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        state = Checkpoint.capture(model, own, lr_scheduler, step, begins_optimizer=step == 0)
        self.writer.append(replace(state, evaluating=()))


def batches_of(trainer: Any) -> Callable[[int], Any]:
    """The batch of any step of a Trainer, as the recipe of `dy.Recipe.from_trainer` takes it.

    A batch is a dict of the model's inputs and the number of items that the loss is divided by; where batches are
    accumulated, a list of them. The order is that of the Trainer's sampler: of the training it did, or, before
    that, of the one it would do, whose order `data_seed` or `seed` of its arguments decides. Collators that draw at
    random draw anew.

    Args:
        trainer: with a dataset of known length.

    Raises:
        RecipeError: the order of the rows cannot be told.
    """
    loader = trainer.callback_handler.train_dataloader
    if loader is None:
        with replayed(None):
            torch.manual_seed(trainer.args.seed)
            loader = trainer.get_train_dataloader()
    dataset, sampler = loader.dataset, getattr(loader.batch_sampler, "sampler", None)
    seeded = hasattr(sampler, "set_epoch") or isinstance(sampler, SequentialSampler)
    if not seeded or not hasattr(dataset, "__getitem__"):
        raise RecipeError(
            f"the order of a {type(dataset).__name__}'s rows under {type(sampler).__name__} cannot be told: it is "
            "drawn as training goes. Give batches of your own, step -> batch."
        )
    batch_sampler = copy.deepcopy(loader.batch_sampler, {id(dataset): dataset})
    n, device = trainer.args.gradient_accumulation_steps, trainer.args.device
    per_epoch = -(-len(batch_sampler) // n)

    @lru_cache(maxsize=2)
    def rows_of(epoch: int) -> list[list[int]]:
        if hasattr(batch_sampler.sampler, "set_epoch"):
            batch_sampler.sampler.set_epoch(epoch)
        with replayed(None):
            return list(batch_sampler)

    def batch_of(step: int) -> Any:
        epoch, place = divmod(step, per_epoch)
        asked = rows_of(epoch)[place * n : (place + 1) * n]
        collated = (loader.collate_fn([dataset[i] for i in rows]) for rows in asked)
        moved = [_pytree.tree_map_only(Tensor, lambda t: t.to(device), dict(each)) for each in collated]
        samples, items = trainer.get_batch_samples(iter(moved), len(moved), device)
        beside = {} if items is None else {ITEMS: items}
        if len(moved) < n:
            beside[COUNT] = len(moved)
        batches = [{**each, **beside} for each in samples]
        return batches if n > 1 else batches[0]

    return batch_of
