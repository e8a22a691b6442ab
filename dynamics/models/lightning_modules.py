"""The training step and the optimizer of a LightningModule, taken without a Trainer.

Nothing of Lightning is imported: a LightningModule is known by its ancestry and by its methods.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from checkpoints.rng import replayed
from dynamics.models.functional import attributes_restored

logger = logging.getLogger(__name__)

MakesOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakesScheduler = Callable[[Optimizer], LRScheduler]

STEP_HOOKS = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_train_batch_start",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "lr_scheduler_step",
    "on_train_batch_end",
)
"""Hooks that may change a step and that only a Trainer calls."""


class RecipeError(ValueError):
    """The recipe lacks what was asked of it, or does not fit the checkpoint."""


class TrainerNeeded(RecipeError):
    """A method of a LightningModule asks for its Trainer, and there is none."""


# --- the module -------------------------------------------------------------------------------------------


def own_copy(module: Any) -> Any:
    """A copy of a LightningModule, without its Trainer or Fabric.

    Raises:
        RecipeError: it is none, it cannot be copied, or its steps are its own or its data loader's affair.
    """
    name = type(module).__name__
    if _lightning_module(module) is None:
        raise RecipeError(
            f"{name} is not a LightningModule. For any other module: dy.Recipe(model, loss=...)."
        )
    if not module.automatic_optimization:
        raise RecipeError(
            f"{name} optimizes by hand (automatic_optimization=False), so its training_step is more than a "
            "loss. Give dy.Recipe a loss (model, batch) -> scalar and an optimizer of your own."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise RecipeError(
            f"{name}.training_step takes batches from a dataloader_iter itself; a recipe hands it one batch. "
            "Write it as training_step(self, batch, batch_idx), or give dy.Recipe a loss of your own."
        )
    if ignored := [hook for hook in STEP_HOOKS if overrides(module, hook)]:
        logger.warning(
            "%s has its own %s, which only a Trainer calls: the recipe's step goes without.",
            name,
            ", ".join(ignored),
        )
    attached = {  # Lightning itself leaves the Trainer out of copies, but not these
        id(value): None
        for part in module.modules()
        for name, value in vars(part).items()
        if name in ("_fabric", "_fabric_optimizers")
    }
    try:
        return copy.deepcopy(module, attached)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(
            f"{name} cannot be copied: {error} An attribute holds something that copy.deepcopy does not take, "
            "such as a loss with its graph; clear it first."
        ) from error


def overrides(module: nn.Module, name: str) -> bool:
    """Whether a LightningModule has a method of its own in place of the one that it inherits."""
    own: Any = getattr(module, name)
    return getattr(own, "__func__", None) is not getattr(_lightning_module(module), name)


def _lightning_module(module: nn.Module) -> type | None:
    return next((c for c in reversed(type(module).__mro__) if c.__name__ == "LightningModule"), None)


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:80]


# --- its training step ------------------------------------------------------------------------------------


def training_loss(model: Any, batch: Any) -> Tensor:
    """What `training_step(batch, 0)` returns: the loss, or the entry "loss".

    Nothing is logged. What the step leaves in attributes that are neither parameters nor buffers (the
    states of metrics, lists of outputs) is taken back, so that every call finds the same module.

    Raises:
        TrainerNeeded: the step asks for the Trainer.
        RecipeError: there is no loss in what it returns.
    """
    arguments = (batch, 0) if _takes_batch_index(model) else (batch,)
    with attributes_restored(model):
        _part_from_trainer(model, "training_step")
        returned = model.training_step(*arguments)
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor):
        raise RecipeError(
            f"{type(model).__name__}.training_step returned {_short(returned)}; a step needs a tensor, or a dict "
            'with the tensor as its "loss". Where it is None a Trainer skips the batch; so leave that batch out.'
        )
    return loss


def _takes_batch_index(model: Any) -> bool:
    """As Lightning decides: by there being a second place for it, whatever its name."""
    parameters = inspect.signature(model.training_step).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(places) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


# --- its optimizer and scheduler --------------------------------------------------------------------------


def factories(model: Any) -> tuple[MakesOptimizer | None, MakesScheduler | None]:
    """`configure_optimizers` as a recipe's optimizer and scheduler; None where it makes none.

    Where it asks for the Trainer, so will the optimizer's factory.

    Raises:
        RecipeError: it returns several optimizers or schedulers, or what Lightning does not know either.
    """
    if not overrides(model, "configure_optimizers"):
        return None, None
    make_optimizer = partial(_make_optimizer, model)
    try:
        optimizer, scheduler = _configured(model, list(model.parameters()))
    except TrainerNeeded:
        return make_optimizer, None
    return None if optimizer is None else make_optimizer, None if scheduler is None else _made_with


def _make_optimizer(model: Any, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The module's optimizer over these parameters; the scheduler made with it hangs on to it.

    (A table of schedulers by optimizer would keep both for ever: a scheduler holds its optimizer.)
    """
    optimizer, scheduler = _configured(model, list(parameters))
    assert optimizer is not None, "configure_optimizers made one before"
    vars(optimizer)["made_with"] = scheduler
    return optimizer


def _made_with(optimizer: Optimizer) -> LRScheduler:
    """The scheduler that was made with this optimizer."""
    scheduler = vars(optimizer).get("made_with")
    if scheduler is None:
        raise RecipeError(
            "configure_optimizers makes a scheduler for its own optimizer, and this is another one. Replace "
            "both: dataclasses.replace(recipe, optimizer=..., scheduler=...); None for a constant rate."
        )
    return scheduler  # type: ignore[no-any-return]


def _configured(
    model: Any, parameters: Sequence[nn.Parameter]
) -> tuple[Optimizer | None, LRScheduler | None]:
    """What `configure_optimizers` makes for a twin of the model that has these very parameters."""
    own = list(model.parameters())
    if [p.shape for p in own] != [p.shape for p in parameters]:
        raise RecipeError(
            f"the optimizer of {type(model).__name__} was given {len(parameters)} parameters that are not its "
            f"{len(own)} in their order; give it list(model.parameters()) of a copy."
        )
    twin = copy.deepcopy(model, {id(p): given for p, given in zip(own, parameters, strict=True)})
    _part_from_trainer(twin, "configure_optimizers")
    with replayed(None):
        optimizers, schedulers = _read(twin.configure_optimizers(), type(model).__name__)
    if len(optimizers) > 1 or len(schedulers) > 1:
        raise RecipeError(
            f"{type(model).__name__}.configure_optimizers returns {len(optimizers)} optimizers and "
            f"{len(schedulers)} schedulers; a recipe has at most one of each. Several groups can share an "
            "optimizer, and torch's ChainedScheduler or SequentialLR joins schedulers."
        )
    optimizer = optimizers[0] if optimizers else None
    if optimizer is None or not schedulers:
        return optimizer, None
    scheduler, moves_every_step = schedulers[0]
    if moves_every_step and not overrides(model, "lr_scheduler_step"):
        return optimizer, scheduler
    return optimizer, HeldScheduler(optimizer, scheduler, type(model).__name__)


def _read(returned: Any, name: str) -> tuple[list[Optimizer], list[tuple[Any, bool]]]:
    """Optimizers, and schedulers with whether each moves after every step, of all forms that Lightning takes.

    Source: `_configure_optimizers` in lightning.pytorch.core.optimizer, 2.6.
    """
    match returned:
        case None:
            return [], []
        case [list(optimizers), schedulers]:
            configs = schedulers if isinstance(schedulers, list) else [schedulers]
        case _:
            entries = returned if isinstance(returned, list | tuple) else [returned]
            dicts = [entry if isinstance(entry, Mapping) else {"optimizer": entry} for entry in entries]
            optimizers = [entry.get("optimizer") for entry in dicts]
            configs = [entry["lr_scheduler"] for entry in dicts if entry.get("lr_scheduler") is not None]
    found = [_with_interval(config) for config in configs]
    if not all(isinstance(optimizer, Optimizer) for optimizer in optimizers) or not all(
        hasattr(scheduler, "load_state_dict") for scheduler, _ in found
    ):
        raise RecipeError(
            f"{name}.configure_optimizers returns {_short(returned)}. Lightning takes an optimizer, "
            '[optimizer], ([optimizer], [scheduler]), {"optimizer": ..., "lr_scheduler": ...} or None.'
        )
    return optimizers, found


def _with_interval(config: Any) -> tuple[Any, bool]:
    """A scheduler, and whether a Trainer moves it after every step; without a word it does at every epoch."""
    if not isinstance(config, Mapping):
        return config, False
    scheduler = config.get("scheduler")
    waits = config.get("reduce_on_plateau", isinstance(scheduler, ReduceLROnPlateau))
    return scheduler, config.get("interval") == "step" and config.get("frequency", 1) == 1 and not waits


class HeldScheduler(LRScheduler):
    """A scheduler that Trainers move at other moments than after every step, held where it stands.

    It has set the learning rates it begins with, and its state goes from checkpoint to checkpoint. A step
    is taken at the rate recorded before it, whatever the scheduler does next, so one step is right
    anywhere. A second one is not, if an epoch ended between them, which a recipe cannot know.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any, name: str) -> None:
        self.optimizer = optimizer
        self.held = scheduler
        self.name = name
        self.steps = 0

    def step(self, epoch: int | None = None) -> None:
        """Let one step pass.

        Raises:
            RecipeError: it is the second.
        """
        self.steps += 1
        if self.steps > 1:
            raise RecipeError(
                f"{self.name}'s {type(self.held).__name__} does not move after every step (Lightning's default "
                'is interval="epoch"), and a recipe does not know where an epoch ends: it replays single '
                "steps. For several within one epoch, at the checkpoint's learning rate: "
                "dataclasses.replace(recipe, scheduler=None)."
            )

    def state_dict(self) -> dict[str, Any]:
        """The held scheduler's state."""
        return self.held.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the held scheduler this state."""
        self.held.load_state_dict(state_dict)


# --- without a Trainer ------------------------------------------------------------------------------------


class _ForLogging:
    """Stands where an optimizer would, for a step that logs its learning rate.

    Whatever is looked up in it is another of these, and every setting is NaN: no number is made up, and a loss that
    is computed from one shows it.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ForLogging()

    def __getitem__(self, key: Any) -> Any:
        return math.nan if isinstance(key, str) else _ForLogging()

    def __iter__(self) -> Iterator[Any]:
        return iter([_ForLogging()])


class _NoTrainer:
    """Stands where the Trainer would and says what is asked of it; there is one process and no logger.

    Of its optimizers a step may log the rates.
    """

    logger = None
    loggers = ()
    optimizers = (_ForLogging(),)
    global_rank = 0
    local_rank = 0

    def __init__(self, method: str, instead: str) -> None:
        self._method = method
        self._instead = instead

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TrainerNeeded(
            f"{self._method} asks its Trainer for {name}, and a recipe has none. {self._instead}, which "
            "dataclasses.replace(Recipe.from_lightning(module), ...) or dy.Recipe(...) takes."
        )


_INSTEAD = {
    "training_step": "Write a loss=(model, batch) -> scalar of your own",
    "configure_optimizers": "Write an optimizer=parameters -> Optimizer of your own (and a scheduler=)",
}


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of logging and printing."""


def _part_from_trainer(module: nn.Module, method: str) -> None:
    """From here on nothing is logged, and the Trainer is missed by name."""
    for part in module.modules():
        if _lightning_module(part) is not None:
            part.trainer = _NoTrainer(f"{type(part).__name__}.{method}", _INSTEAD[method])  # type: ignore[assignment]
            vars(part).update(dict.fromkeys(("log", "log_dict", "print"), _do_nothing))
