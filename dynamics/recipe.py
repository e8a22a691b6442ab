"""Recipe and Contrast: how one training step is taken, and which two steps are compared on what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree

from checkpoints.html import facts
from dynamics.models import lightning_modules, trainers
from dynamics.models.lightning_modules import RecipeError as RecipeError
from dynamics.trees import described


@dataclass(frozen=True)
class ByNorm:
    """Scale the whole gradient by min(1, max_norm / (‖g‖₂ + 1e-6)), as `clip_grad_norm_` does.

    Attributes:
        max_norm: the largest ‖g‖₂ that is left as it is.
        over: whose gradients ‖g‖₂ counts: of every parameter of the "model", in its order, as
            `clip_grad_norm_(model.parameters(), max_norm)` and the Hugging Face Trainer do; or of the "optimizer"
            alone, group by group, as Lightning does. With several groups the two differ in the last bit, and
            where the optimizer holds only a part of the model in the norm itself.

    Raises:
        RecipeError: `over` is neither.
    """

    max_norm: float
    over: Literal["model", "optimizer"] = "model"

    def __post_init__(self) -> None:
        if self.over not in ("model", "optimizer"):
            raise RecipeError(
                f"ByNorm(over={self.over!r}): expected 'model' (every parameter with a gradient) or 'optimizer' "
                "(those that the optimizer holds)."
            )


@dataclass(frozen=True)
class ByValue:
    """Clamp every element of the gradient to [−limit, limit], as `clip_grad_value_` does."""

    limit: float


Clip = ByNorm | ByValue | None
Rates = float | Sequence[float] | Mapping[int | str, float]


@dataclass(frozen=True)
class Recipe:
    """How one training step is taken.

    Attributes:
        model: its modules and code; its parameters are never modified by a verb.
        loss: (model, batch) -> scalar. May be absent where only activations are patched.
        optimizer: parameters -> torch.optim.Optimizer, such as `partial(torch.optim.AdamW, lr=1e-3)`.
        scheduler: optimizer -> learning-rate scheduler stepped after each step, or None.
        clip: `ByNorm`, `ByValue` or None; `max_grad_norm=` is the shorthand for by norm.
        learning_rate: step -> the rate that is assigned to the optimizer's groups before that step: a number for
            all, a list by group, or a dict by the group's number or its "name". In place of a scheduler.
        unused: what becomes of a parameter that a batch does not use: "skip" (`zero_grad()`: it has no gradient and
            stays) or "coast" (`zero_grad(set_to_none=False)`: its gradient is zero, so it decays and its momentum
            carries it, from its first gradient on).
        accumulate: micro-batches in a step. With several, a step's batch is a list of them, and each one's loss is
            divided by this number.
        scaler: makes the GradScaler of training with float16, such as `torch.amp.GradScaler`; or None. Replays
            scale, unscale and skip steps by it; what verbs exchange are gradients without it.

    The loss runs in the mode (train or eval) the model is in, and in a replay in that which the checkpoint recorded
    for each submodule, if it did; measures run in eval mode.

    Raises:
        RecipeError: an optimizer or a scheduler where what makes one belongs, two ways to say one thing, or a value
            that is none of those above.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor] | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    clip: Clip = None
    max_grad_norm: InitVar[float | None] = None
    learning_rate: Callable[[int], Rates] | None = None
    unused: Literal["skip", "coast"] = "skip"
    accumulate: int = 1
    scaler: Callable[[], GradScaler] | None = None

    def __post_init__(self, max_grad_norm: float | None) -> None:
        for kind, given, made, example in (
            ("optimizer", self.optimizer, Optimizer, "torch.optim.AdamW, lr=1e-3"),
            ("scheduler", self.scheduler, LRScheduler, "torch.optim.lr_scheduler.StepLR, step_size=30"),
        ):
            if isinstance(given, made):
                raise RecipeError(
                    f"{kind}= is an existing {type(given).__name__}; steps are taken on copies of the "
                    f"model, so expected is what makes a new one: {kind}=partial({example})."
                )
        if self.scheduler is not None and self.learning_rate is not None:
            raise RecipeError("give scheduler= or learning_rate=, not both: each sets the groups' rates.")
        if self.unused not in ("skip", "coast"):
            raise RecipeError(f"unused={self.unused!r}: expected 'skip' or 'coast'.")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise RecipeError(
                f"accumulate={self.accumulate!r}: expected a number of micro-batches, 1 or more."
            )
        if max_grad_norm is None:
            return
        if self.clip is not None:
            raise RecipeError("give clip= or max_grad_norm=, not both: max_grad_norm=x means clip=ByNorm(x).")
        object.__setattr__(self, "clip", ByNorm(max_grad_norm))

    def _repr_html_(self) -> str:
        numbers = sum(p.numel() for p in self.model.parameters())
        rows: list[tuple[str, object]] = [("model", f"{type(self.model).__name__} of {numbers:,} parameters")]
        for name in ("loss", "optimizer", "scheduler", "learning_rate"):
            function = getattr(self, name)
            rows += [] if function is None else [(name, _name(function) if callable(function) else function)]
        rows += [("clip", self.clip or "none"), ("unused", self.unused), ("accumulate", self.accumulate)]
        return facts("Recipe", rows)

    def __repr__(self) -> str:
        n_parameters = sum(p.numel() for p in self.model.parameters())
        parts = [f"{type(self.model).__name__} of {n_parameters:,} parameters"]
        for name in ("loss", "optimizer", "scheduler"):
            if (function := getattr(self, name)) is not None:
                parts.append(f"{name}={_name(function)}")
        if self.clip is not None:
            parts.append(f"clip={self.clip}")
        if self.learning_rate is not None:
            parts.append(f"learning_rate={_name(self.learning_rate)}")
        if self.unused != "skip":
            parts.append(f"unused={self.unused!r}")
        if self.accumulate > 1:
            parts.append(f"accumulate={self.accumulate}")
        if self.scaler is not None:
            parts.append(f"scaler={_name(self.scaler)}")
        return f"Recipe({', '.join(parts)})"

    @classmethod
    def from_lightning(cls, module: nn.Module, clip: Clip = None) -> Recipe:
        """The step that a LightningModule takes, read from `training_step` and `configure_optimizers`.

        The model is a copy of the module under the module's own names, so it fits what a TrajectoryRecorder
        keeps of it; the module itself is not changed. On the copy `log`, `log_dict` and `print` do nothing,
        the batch index is 0, and after every call metrics and other attributes are what they were before.

        What the Trainer holds is not read: clipping (give it as clip=), accumulation of batches (then
        `dataclasses.replace(recipe, accumulate=n)`), precision. A step that logs its learning rate logs nothing.
        Nor are the hooks that only a Trainer calls, such as `on_after_backward`; a module that has some is
        logged. Layers that `setup` or `configure_model` make must be there already.

        A scheduler with interval "step" and frequency 1 is the recipe's scheduler. Any other (Lightning's
        default is once per epoch, and a recipe does not know its epochs) stays where a checkpoint has it:
        one step is exact, at the checkpoint's own learning rate, and the rate it leaves behind is not yet
        that of a next epoch; replaying several at once is refused.

        Args:
            module: any LightningModule with automatic optimization and at most one optimizer.
            clip: the Trainer's `gradient_clip_val`, as `ByNorm` or `ByValue`; a norm is taken over the optimizer's
                parameters, as Lightning does.

        Raises:
            RecipeError: the module optimizes by hand, cannot be copied, or configures what is not one
                optimizer with at most one scheduler. Where a method asks for its Trainer, the recipe raises
                when it needs that method; `dataclasses.replace` gives it another loss or optimizer.
        """
        model = lightning_modules.own_copy(module)
        optimizer, scheduler = lightning_modules.factories(model)
        loss = (
            lightning_modules.training_loss if lightning_modules.overrides(model, "training_step") else None
        )
        if isinstance(clip, ByNorm):
            clip = replace(clip, over="optimizer")
        return cls(model, loss, optimizer, scheduler, clip)

    @classmethod
    def from_trainer(cls, trainer: Any) -> Recipe:
        """The step that a Hugging Face Trainer takes, before it trains or after; TRL's Trainers inherit from it.

        The model is a copy; the Trainer itself is not changed. Its `compute_loss` is the loss, under its autocast;
        its optimizer with its groups, its scheduler, `max_grad_norm` and `gradient_accumulation_steps` are read.
        `dy.training.batches_of(trainer)` gives the batch of each step, `dy.training.HuggingFaceRecorder` keeps the
        trajectory.

        Args:
            trainer: of one process and device, in single precision or bfloat16.

        Raises:
            RecipeError: it is no Trainer, or another kind. Where the Trainer was given a scheduler, the recipe
                raises when it needs it; `dataclasses.replace` gives it one.
        """
        model, limit = trainers.own_copy(trainer), trainer.args.max_grad_norm
        return cls(
            model=model,
            loss=partial(trainers.trainer_loss, trainer),
            optimizer=trainers.optimizer_factory(trainer),
            scheduler=trainers.scheduler_factory(trainer),
            clip=ByNorm(limit, over="model") if limit else None,
            accumulate=trainer.args.gradient_accumulation_steps,
        )

    def require_loss(self) -> Callable[[Any, Any], Tensor]:
        """The loss of a step's batch, of all its micro-batches at once; or an error that says to give one."""
        if self.loss is None:
            raise RecipeError(
                "this verb takes a training step: give the recipe loss=(model, batch) -> scalar."
            )
        return self.loss if self.accumulate == 1 else self._accumulated

    def micro_batches(self, batch: Any) -> Sequence[Any]:
        """What the losses of a step eat one after another.

        Raises:
            RecipeError: gradients are accumulated, and the batch is no list of at most that many.
        """
        if self.accumulate == 1:
            return [batch]
        if not isinstance(batch, list) or not 1 <= len(batch) <= self.accumulate:
            raise RecipeError(
                f"a step of accumulate={self.accumulate} takes a list of that many micro-batches, or of fewer at "
                f"an epoch's end; it was given {described(batch)}."
            )
        return batch

    def micro_loss(self, model: Any, batch: Any) -> Tensor:
        """One micro-batch's part of the step's loss."""
        assert self.loss is not None, "require_loss() comes first"
        loss = self.loss(model, batch)
        return loss if self.accumulate == 1 else loss / self.accumulate

    def _accumulated(self, model: Any, batch: Any) -> Tensor:
        first, *others = (self.micro_loss(model, each) for each in self.micro_batches(batch))
        return sum(others, first)

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """A new optimizer over the given parameters, or an error that says to give one.

        Raises:
            RecipeError: there is no optimizer, or it holds other parameters than those it was given: a step
                on a copy would move the original.
        """
        if self.optimizer is None:
            raise RecipeError(
                "this verb takes a training step: give the recipe optimizer=parameters -> Optimizer, "
                "such as partial(torch.optim.AdamW, lr=1e-3)."
            )
        given = list(parameters)
        optimizer = self.optimizer(given)
        known = {id(p) for p in given}
        if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
            raise RecipeError(
                "the recipe's optimizer holds other parameters than it was given. Make it of its argument: "
                "optimizer=lambda parameters: AdamW(parameters, ...)."
            )
        return optimizer

    def build_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """A new scheduler on an optimizer, whose learning rate it sets; None where the recipe has none."""
        return self.scheduler(optimizer) if self.scheduler else None


@dataclass(frozen=True)
class Contrast:
    """Two training batches to be compared, and what their steps are measured on.

    Attributes:
        base: the batch whose step is taken, except where a site is exchanged.
        source: the batch the exchanged quantity comes from; may be absent where two checkpoints are compared.
        probe: what the measure is evaluated on.
        coords: labels of this contrast along the `example` dim (alias, set, integer, ...).
    """

    base: Any
    source: Any = None
    probe: Any = None
    coords: Mapping[str, str | int | float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return described(self)

    def _repr_html_(self) -> str:
        batches = [(name, described(getattr(self, name))) for name in ("base", "source", "probe")]
        return facts("Contrast", [*batches, *self.coords.items()])

    def reversed(self) -> Contrast:
        """Base and source exchanged: necessity where the contrast asked for sufficiency; a base alone stays."""
        return self if self.source is None else replace(self, base=self.source, source=self.base)

    def to(self, device: torch.device | str) -> Contrast:
        """The same contrast with all tensors of its batches on another device: that of the recipe's model."""
        batches = {"base": self.base, "source": self.source, "probe": self.probe}
        moved = _pytree.tree_map_only(Tensor, lambda t: t.to(device), batches)
        return replace(self, **moved)


def _name(function: Callable[..., Any]) -> str:
    """What a function is called, a partial one with its arguments: `AdamW(lr=0.001)`."""
    if not isinstance(function, partial):
        return getattr(function, "__qualname__", type(function).__qualname__)
    keywords = [
        f"{name}={_name(v) if callable(v) else described(v)}" for name, v in function.keywords.items()
    ]
    return f"{_name(function.func)}({', '.join([*map(described, function.args), *keywords])})"
