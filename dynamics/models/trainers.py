"""The model, loss, optimizer and scheduler of a Hugging Face Trainer (or TRL's), taken without its loop.

Nothing of transformers is imported: a Trainer is known by its methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dynamics.models.lightning_modules import RecipeError

ITEMS, COUNT = "num_items_in_batch", "accumulated_batches"
"""What a batch holds beside the model's inputs: predicted tokens in the whole step; micro-batches, if fewer."""


def own_copy(trainer: Any) -> Any:
    """A copy of a Trainer's model in train mode, without the autocast that accelerate puts around its forward.

    Raises:
        RecipeError: it is no Trainer, or trains in float16 or on several devices.
    """
    if not all(
        hasattr(trainer, name) for name in ("compute_loss", "create_optimizer", "accelerator", "args")
    ):
        raise RecipeError(
            f"{type(trainer).__name__} is no Hugging Face Trainer: it has no compute_loss or optimizer."
        )
    if trainer.accelerator.scaler is not None or trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise RecipeError(
            "a Trainer in float16, or on several devices, takes steps that a recipe of it does not replay. "
            "bfloat16 and single precision on one device are read."
        )
    model = copy.deepcopy(trainer.model)
    inner = vars(model).pop("_original_forward", None)
    if inner is not None:
        if getattr(inner, "__func__", None) is type(model).forward:
            del model.forward
        else:
            model.forward = inner
    return model.train()


def trainer_loss(trainer: Any, model: Any, batch: Mapping[str, Any]) -> Tensor:
    """What `compute_loss` gives for a micro-batch, as the mean over a step's micro-batches takes it.

    A model that is told the number of items in the whole step gives its micro-batch's share of the loss; others
    give the micro-batch's own mean, over which the Trainer then takes the mean.
    """
    inputs = {name: value for name, value in batch.items() if name not in (ITEMS, COUNT)}
    items, n = batch.get(ITEMS), trainer.args.gradient_accumulation_steps
    called = _Autocast(trainer.accelerator, model) if trainer.accelerator.native_amp else model
    loss: Tensor = trainer.compute_loss(called, inputs, num_items_in_batch=items)
    if n == 1:
        return loss
    is_share = getattr(trainer, "loss_is_scaled_for_ga", None)
    if is_share is None:
        told = trainer.model_accepts_loss_kwargs and items is not None
        is_share = told or trainer.compute_loss_func is not None
    if not is_share:
        loss = loss / batch.get(COUNT, n)
    share: Tensor = loss * n  # which the recipe divides by n
    return share


class _Autocast:
    """A model whose calls are autocast as accelerate does it, which else replaces its forward."""

    def __init__(self, accelerator: Any, model: nn.Module) -> None:
        self._accelerator = accelerator
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from accelerate.utils import convert_to_fp32

        with self._accelerator.autocast():
            outputs = self._model(*args, **kwargs)
        return convert_to_fp32(outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def optimizer_factory(trainer: Any) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """Makes optimizers like the Trainer's: the same groups, at the rates that training began with."""
    twin = copy.copy(trainer)
    made = twin.optimizer if twin.optimizer is not None else twin.create_optimizer()
    made = getattr(made, "optimizer", made)  # accelerate wraps it
    place = {id(p): i for i, p in enumerate(trainer.model.parameters())}
    groups = [
        {
            **{key: value for key, value in group.items() if key not in ("params", "initial_lr")},
            "lr": group.get("initial_lr", group["lr"]),
            "params": [place[id(p)] for p in group["params"]],
        }
        for group in made.param_groups
    ]
    return partial(_optimizer_like, type(made), groups)


def _optimizer_like(
    kind: Callable[..., Optimizer], groups: Sequence[Mapping[str, Any]], parameters: Iterable[nn.Parameter]
) -> Optimizer:
    given = list(parameters)
    return kind([{**group, "params": [given[i] for i in group["params"]]} for group in groups])


def scheduler_factory(trainer: Any) -> Callable[[Optimizer], LRScheduler]:
    """Makes schedulers like the Trainer's."""
    return partial(_scheduler_like, trainer)


def _scheduler_like(trainer: Any, optimizer: Optimizer) -> LRScheduler:
    twin = copy.copy(trainer)
    given = twin.lr_scheduler is not None and not twin._created_lr_scheduler
    twin.lr_scheduler = None
    made: LRScheduler = twin.create_scheduler(total_steps(trainer), optimizer)
    if given or isinstance(made, ReduceLROnPlateau) or type(made).__name__ == "GreedyLR":
        raise RecipeError(
            "the Trainer was given a scheduler, or has one that waits for a metric; a recipe makes the Trainer's "
            "own, of args.lr_scheduler_type. Give it one: dataclasses.replace(recipe, scheduler=optimizer -> "
            "scheduler)."
        )
    return made


def total_steps(trainer: Any) -> int:
    """How many steps a Trainer takes: what its schedule is made for."""
    if trainer.state.max_steps > 0:
        return int(trainer.state.max_steps)
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[-1])
