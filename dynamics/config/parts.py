"""The parts that the config of every run has: model, phases, schedule, trainer; and what they make together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from dynamics.config.checks import ConfigError, built, check_seed, choice, plain, require

Precision = Literal["32-true", "bf16-mixed"]
Dtype = Literal["float32", "float64", "bfloat16"]
Activation = Literal["relu", "gelu", "silu", "solu"]
Normalization = Literal["LN", "RMS", "none"]
LoggerName = Literal["csv", "tensorboard", "wandb"]

_Run = TypeVar("_Run", bound="RunConfig")
_Phases = TypeVar("_Phases", bound="Phases")


@dataclass(frozen=True)
class ToyConfig:
    """The toy transformer (models/toy.py). `seed` draws the weights; None takes the study's."""

    n_layers: int = 2
    n_heads: int = 4
    d_model: int = 128
    d_head: int = 32
    d_mlp: int = 256
    n_ctx: int = 4
    attn_only: bool = False
    activation: Activation = "relu"
    normalization: Normalization = "LN"
    dtype: Dtype = "float32"
    seed: int | None = None

    def __post_init__(self) -> None:
        choice("model.activation", self.activation, Activation)
        choice("model.normalization", self.normalization, Normalization)
        choice("model.dtype", self.dtype, Dtype)
        check_seed("model.seed", self.seed)
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx"):
            require(
                getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1."
            )


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of training: its length, its peak learning rate, and linear warm-up in steps."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 0

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"a phase has {self.steps} steps; it needs at least 1.")
        require(
            self.learning_rate > 0, f"a phase's learning_rate is {self.learning_rate}; it must be above 0."
        )
        require(self.warmup >= 0, f"a phase's warmup is {self.warmup} steps; it cannot be negative.")


@dataclass(frozen=True)
class ScheduleConfig:
    """Which steps are kept and which are evaluated, in every phase anew.

    Attributes:
        per_decade: checkpoints per factor of ten, counted from the start of the phase.
        dense: how many first steps of the last phase (X2) are all kept.
        evaluate_every: steps between evaluations; every kept step is evaluated too.
    """

    per_decade: int = 8
    dense: int = 12
    evaluate_every: int = 50

    def __post_init__(self) -> None:
        require(self.per_decade >= 1, "schedule.per_decade must be at least 1.")
        require(self.dense >= 0, "schedule.dense cannot be negative.")
        require(self.evaluate_every >= 1, "schedule.evaluate_every must be at least 1.")


@dataclass(frozen=True)
class TrainerConfig:
    """Lightning's own settings: accelerator, precision, logger; and torch's threads on CPU.

    Precision `32-true` computes in the model's own dtype (`model.dtype: float64` for doubles); `bf16-mixed`
    takes the forward pass under autocast, in training and in replay.
    """

    accelerator: str = "auto"
    precision: Precision = "32-true"
    logger: LoggerName = "csv"
    threads: int = 1

    def __post_init__(self) -> None:
        choice("trainer.precision", self.precision, Precision)
        choice("trainer.logger", self.logger, LoggerName)
        require(self.threads >= 1, "trainer.threads must be at least 1.")


@dataclass(frozen=True)
class Phases:
    """Stretches of training one after another: the fields that are a `PhaseConfig`, in their order.

    Attributes:
        goes_on: the phases that go on with the optimizer of the phase before; every other begins a new one.
        batch_size, betas, weight_decay, max_grad_norm: shared by all phases; clipping is by total norm.
    """

    goes_on: ClassVar[tuple[str, ...]] = ()
    if TYPE_CHECKING:  # fields of every subclass, each with a default and an order of its own
        batch_size: int
        betas: tuple[float, float]
        weight_decay: float
        max_grad_norm: float

    def __post_init__(self) -> None:
        """Make the phases of plain data and check what they share."""
        object.__setattr__(self, "betas", tuple(self.betas))
        for f in fields(self):
            if f.name in _phase_names(type(self)):
                object.__setattr__(
                    self, f.name, built(PhaseConfig, getattr(self, f.name), f"phases.{f.name}")
                )
        require(self.batch_size >= 1, f"phases.batch_size is {self.batch_size}; it must be at least 1.")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"phases.betas is {self.betas}; AdamW takes two numbers, each at least 0 and below 1.",
        )
        require(self.weight_decay >= 0, f"phases.weight_decay is {self.weight_decay}; it cannot be negative.")
        require(self.max_grad_norm > 0, f"phases.max_grad_norm is {self.max_grad_norm}; it must be above 0.")

    @property
    def by_name(self) -> dict[str, PhaseConfig]:
        """Each phase, in their order."""
        return {name: getattr(self, name) for name in _phase_names(type(self))}

    @property
    def starts(self) -> dict[str, int]:
        """First step of each phase, and under `end` the step after the last."""
        starts, step = {}, 0
        for name, phase in self.by_name.items():
            starts[name] = step
            step += phase.steps
        return {**starts, "end": step}

    @property
    def optimizer_starts(self) -> tuple[int, ...]:
        """The steps that begin with a new optimizer."""
        return tuple(self.starts[name] for name in self.by_name if name not in self.goes_on)

    def locate(self, step: int) -> tuple[str, int]:
        """Phase of a step and the step within it."""
        starts = self.starts
        if not 0 <= step < starts["end"]:
            raise ConfigError(f"step {step} lies outside the run's steps 0..{starts['end'] - 1}.")
        name = next(name for name in reversed(self.by_name) if step >= starts[name])
        return name, step - starts[name]

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step; after the last step, that of the last."""
        name, local = self.locate(min(step, self.starts["end"] - 1))
        phase = self.by_name[name]
        return phase.learning_rate * min(1.0, (local + 1) / (phase.warmup + 1))

    def stop_below(self, phase: str) -> float | None:
        """The loss on held-out rows (nats) below which a phase ends early; None where it never does."""
        return None

    def shortened(self: _Phases, phase: str, n_steps: int) -> _Phases:
        """The same phases, one of them as long as it was."""
        changed: dict[str, Any] = {phase: replace(self.by_name[phase], steps=n_steps)}
        return replace(self, **changed)


def _phase_names(kind: type[Phases]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if isinstance(f.default, PhaseConfig))


class TaskConfig(Protocol):
    """What the config of every task has: seeds of its own, where None takes the run's."""

    @property
    def seed(self) -> int | None:
        """Draws the data and its splits."""

    @property
    def order_seed(self) -> int | None:
        """Draws the order of the rows."""


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs to be trained again. Each task has its own: a dataclass whose fields are these.

    Attributes:
        task: what is learnt.
        model, phases, schedule, trainer: how.
        seed: of everything that has none of its own.
        replayed: steps besides those of the schedule whose checkpoints are kept.
    """

    if TYPE_CHECKING:  # fields of every subclass, each with a default and an order of its own
        task: TaskConfig
        model: ToyConfig
        phases: Phases
        schedule: ScheduleConfig
        trainer: TrainerConfig
        seed: int

    def __post_init__(self) -> None:
        """Make the parts of plain data."""
        for f in fields(self):
            if is_dataclass(f.default):
                part = built(type(f.default), getattr(self, f.name), f.name)
                object.__setattr__(self, f.name, part)
        check_seed("seed", self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, as written beside every run."""
        nested: dict[str, Any] = plain(asdict(self))
        return nested

    @property
    def replayed(self) -> tuple[int, ...]:
        """Steps besides those of the schedule whose checkpoints are kept."""
        return ()

    @property
    def split_seed(self) -> int:
        """Draws the sets, splits and false definitions."""
        return self.seed if self.task.seed is None else self.task.seed

    @property
    def order_seed(self) -> int:
        """Draws the order of the rows."""
        return self.seed if self.task.order_seed is None else self.task.order_seed

    @property
    def weights_seed(self) -> int:
        """Draws the weights the model starts from."""
        return self.seed if self.model.seed is None else self.model.seed

    @classmethod
    def from_dict(cls: type[_Run], data: Mapping[str, Any]) -> _Run:
        """The config written by `to_dict`; unknown keys are named beside the valid ones."""
        return built(cls, data, "the config")
