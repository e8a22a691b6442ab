"""What a study is: one `StudyConfig` of frozen dataclasses, checked where it is made.

Plain data without torch, so that the command line can show and check it at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

_Part = TypeVar("_Part")

Operation = Literal["prod", "sum", "ssq"]
Roles = Literal["drawn", "exchanged"]
Tags = Literal["by_set", "random"]
OptimizerState = Literal["stored", "fresh"]
Level = Literal["layers", "components", "heads", "circuits", "matrices", "up_to_layer"]
MeasureName = Literal["correct_logit", "centred_logit", "correct_log_prob", "probability"]
Precision = Literal["32-true", "bf16-mixed"]
Dtype = Literal["float32", "float64", "bfloat16"]
Activation = Literal["relu", "gelu", "silu", "solu"]
Normalization = Literal["LN", "RMS", "none"]
LoggerName = Literal["csv", "tensorboard", "wandb"]


class ConfigError(ValueError):
    """A config that no study could be run with; the message says what to change."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _choice(name: str, value: object, literal: object) -> None:
    allowed = get_args(literal)
    _require(value in allowed, f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def _check_seed(name: str, seed: int | None) -> None:
    _require(seed is None or seed >= 0, f"{name} is {seed}; a seed is at least 0.")


def _built(kind: type[_Part], value: _Part | Mapping[str, Any], where: str) -> _Part:
    """A part of the config from plain data; unknown keys are named beside the valid ones."""
    if not isinstance(value, Mapping):
        return value
    valid = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    wrong = sorted(set(value) - valid)
    _require(not wrong, f"unknown config keys {wrong} in {where}; valid are {sorted(valid)}.")
    return kind(**value)


def answer(operation: Operation, x: int, y: int, modulus: int) -> int:
    """Result of `x operation y` in arithmetic modulo `modulus`."""
    return {"prod": x * y, "sum": x + y, "ssq": x * x + y * y}[operation] % modulus


@dataclass(frozen=True)
class AliasConfig:
    """The alias task (tasks/aliases.py): integers, their aliases, definitions and questions.

    Attributes:
        modulus: integers are 0 .. modulus-1; a multiple of 4, one quarter for each of the four sets.
        multipliers: the known operands that questions ask about.
        train_multipliers: how many of them, drawn for every alias, are asked in training; the dial.
        operation: prod (x y), sum (x + y) or ssq (x² + y²), modulo `modulus`.
        x2_keeps_x1: whether X2 trains on X1's rows too, or on definitions and table rows alone.
        swap_defs: whether a definition gives the integer first and asks for the alias.
        result_as_alias: whether a question's answer is written as an alias.
        table_fraction: share of the training table's rows that stay in X1 and X2.
        heldout_fraction: share of the table's (unordered) pairs that is never trained on.
        definition_copies: how often each definition stands among the rows of X1 and X2.
        x1_tags: what tags say in X1: "by_set", true or false; or "random", nothing: each alias's tag is drawn.
        x2_roles: which held-out quarter carries the reliable tag in X2: as drawn, or exchanged.
        seed: draws the sets, splits and false definitions; None takes the study's.
        order_seed: draws the order of the rows; None takes the study's.
    """

    modulus: int = 60
    multipliers: tuple[int, ...] = (2, 3, 5, 6, 10, 15)
    train_multipliers: int = 5
    operation: Operation = "prod"
    x2_keeps_x1: bool = True
    swap_defs: bool = False
    result_as_alias: bool = False
    table_fraction: float = 0.25
    heldout_fraction: float = 0.1
    definition_copies: int = 3
    x1_tags: Tags = "by_set"
    x2_roles: Roles = "drawn"
    seed: int | None = None
    order_seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        _choice("task.operation", self.operation, Operation)
        _choice("task.x1_tags", self.x1_tags, Tags)
        _choice("task.x2_roles", self.x2_roles, Roles)
        m = self.modulus
        _require(m >= 8, f"task.modulus is {m}; below 8 the four sets have fewer than two integers each.")
        _require(m % 4 == 0, f"task.modulus {m} does not divide into four equal sets; take a multiple of 4.")
        n = len(self.multipliers)
        _require(n > 0, "task.multipliers is empty; questions need at least one.")
        _require(len(set(self.multipliers)) == n, f"task.multipliers {self.multipliers} repeats a value.")
        outside = [d for d in self.multipliers if not 0 <= d < m]
        _require(not outside, f"task.multipliers {outside} lie outside 0..{m - 1}.")
        _require(
            1 <= self.train_multipliers <= n,
            f"task.train_multipliers is {self.train_multipliers}; with {n} multipliers it must be 1..{n}.",
        )
        _require(
            any(len({answer(self.operation, x, d, m) for x in range(m)}) > 1 for d in self.multipliers),
            f"task.multipliers {self.multipliers} identify nothing: every integer has the same answer under "
            f"each of them modulo {m}. Take divisors of the modulus larger than 1.",
        )
        for name in ("table_fraction", "heldout_fraction"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"task.{name} is {value}; it is a share, at least 0 and below 1.")
        pairs = m * (m + 1) // 2
        _require(
            round(self.heldout_fraction * pairs) < pairs,
            f"task.heldout_fraction {self.heldout_fraction} leaves none of {pairs} pairs to train on.",
        )
        _check_seed("task.seed", self.seed)
        _check_seed("task.order_seed", self.order_seed)
        _require(self.definition_copies >= 1, "task.definition_copies must be at least 1.")


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
        _choice("model.activation", self.activation, Activation)
        _choice("model.normalization", self.normalization, Normalization)
        _choice("model.dtype", self.dtype, Dtype)
        _check_seed("model.seed", self.seed)
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx"):
            _require(
                getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1."
            )


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of training: its length, its peak learning rate, and linear warm-up in steps."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 0

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"a phase has {self.steps} steps; it needs at least 1.")
        _require(
            self.learning_rate > 0, f"a phase's learning_rate is {self.learning_rate}; it must be above 0."
        )
        _require(self.warmup >= 0, f"a phase's warmup is {self.warmup} steps; it cannot be negative.")


@dataclass(frozen=True)
class PhasesConfig:
    """How the run is trained: pretraining with one AdamW, then X1 and X2 with another one.

    Attributes:
        pretrain, x1, x2: the three phases, in this order.
        stop_pretrain_at: ends pretraining once the loss on held-out table rows is below it (nats); the
            config kept beside the run then holds the number of steps that were taken.
        batch_size, betas, weight_decay, max_grad_norm: shared by all phases; clipping is by total norm.
    """

    pretrain: PhaseConfig = PhaseConfig(steps=1500, warmup=50)
    x1: PhaseConfig = PhaseConfig(steps=3000, warmup=50)
    x2: PhaseConfig = PhaseConfig(steps=2000)
    stop_pretrain_at: float | None = None
    batch_size: int = 64
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.3
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("pretrain", "x1", "x2"):
            object.__setattr__(self, name, _built(PhaseConfig, getattr(self, name), f"phases.{name}"))
        _require(self.batch_size >= 1, f"phases.batch_size is {self.batch_size}; it must be at least 1.")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"phases.betas is {self.betas}; AdamW takes two numbers, each at least 0 and below 1.",
        )
        _require(
            self.weight_decay >= 0, f"phases.weight_decay is {self.weight_decay}; it cannot be negative."
        )
        _require(self.max_grad_norm > 0, f"phases.max_grad_norm is {self.max_grad_norm}; it must be above 0.")

    @property
    def starts(self) -> dict[str, int]:
        """First step of each phase, and under `end` the step after the last."""
        x1 = self.pretrain.steps
        x2 = x1 + self.x1.steps
        return {"pretrain": 0, "x1": x1, "x2": x2, "end": x2 + self.x2.steps}

    def locate(self, step: int) -> tuple[str, int]:
        """Phase of a step and the step within it."""
        starts = self.starts
        if not 0 <= step < starts["end"]:
            raise ConfigError(f"step {step} lies outside the run's steps 0..{starts['end'] - 1}.")
        name = next(name for name in ("x2", "x1", "pretrain") if step >= starts[name])
        return name, step - starts[name]

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step; after the last step, that of the last."""
        name, local = self.locate(min(step, self.starts["end"] - 1))
        phase: PhaseConfig = getattr(self, name)
        return phase.learning_rate * min(1.0, (local + 1) / (phase.warmup + 1))


@dataclass(frozen=True)
class ScheduleConfig:
    """Which steps are kept and which are evaluated, in every phase anew.

    Attributes:
        per_decade: checkpoints per factor of ten, counted from the start of the phase.
        dense: how many first steps of X2 are all kept.
        evaluate_every: steps between evaluations; every kept step is evaluated too.
    """

    per_decade: int = 8
    dense: int = 12
    evaluate_every: int = 50

    def __post_init__(self) -> None:
        _require(self.per_decade >= 1, "schedule.per_decade must be at least 1.")
        _require(self.dense >= 0, "schedule.dense cannot be negative.")
        _require(self.evaluate_every >= 1, "schedule.evaluate_every must be at least 1.")


@dataclass(frozen=True)
class PrimaryConfig:
    """The one analysis named before anything is looked at; everything else is exploratory."""

    x2_step: int = 10
    optimizer: OptimizerState = "fresh"
    measure: MeasureName = "correct_logit"
    level: Level = "components"

    def __post_init__(self) -> None:
        _choice("patching.primary.optimizer", self.optimizer, OptimizerState)
        _choice("patching.primary.measure", self.measure, MeasureName)
        _choice("patching.primary.level", self.level, Level)


@dataclass(frozen=True)
class PatchingConfig:
    """Which steps of X2 are replayed, from which optimizer state, where and what is measured."""

    x2_steps: tuple[int, ...] = (0, 10, 50, 400)
    optimizers: tuple[OptimizerState, ...] = ("stored", "fresh")
    levels: tuple[Level, ...] = get_args(Level)
    measures: tuple[MeasureName, ...] = ("correct_logit", "centred_logit", "correct_log_prob")
    primary: PrimaryConfig = PrimaryConfig()

    def __post_init__(self) -> None:
        for name, literal in (("optimizers", OptimizerState), ("levels", Level), ("measures", MeasureName)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for value in getattr(self, name):
                _choice(f"patching.{name}", value, literal)
        object.__setattr__(self, "x2_steps", tuple(self.x2_steps))
        object.__setattr__(self, "primary", _built(PrimaryConfig, self.primary, "patching.primary"))
        for name in ("x2_steps", "optimizers", "levels", "measures"):
            values = getattr(self, name)
            _require(len(values) > 0, f"patching.{name} is empty; give at least one.")
            _require(len(set(values)) == len(values), f"patching.{name} {values} repeats a value.")
        for name, value, where in (
            ("x2_step", self.primary.x2_step, self.x2_steps),
            ("optimizer", self.primary.optimizer, self.optimizers),
            ("measure", self.primary.measure, self.measures),
            ("level", self.primary.level, self.levels),
        ):
            _require(value in where, f"patching.primary.{name} is {value!r}, which is not among {where}.")


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
        _choice("trainer.precision", self.precision, Precision)
        _choice("trainer.logger", self.logger, LoggerName)
        _require(self.threads >= 1, "trainer.threads must be at least 1.")


@dataclass(frozen=True)
class StudyConfig:
    """Everything a study needs to be run again."""

    task: AliasConfig = AliasConfig()
    model: ToyConfig = ToyConfig()
    phases: PhasesConfig = PhasesConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    patching: PatchingConfig = PatchingConfig()
    trainer: TrainerConfig = TrainerConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks that concern several parts."""
        for name, kind in _PARTS.items():
            object.__setattr__(self, name, _built(kind, getattr(self, name), name))
        _check_seed("seed", self.seed)
        _require(
            self.model.n_ctx >= 4,
            f"model.n_ctx is {self.model.n_ctx}; definitions and questions have 4 tokens.",
        )
        late = [s for s in self.patching.x2_steps if not 0 <= s < self.phases.x2.steps]
        _require(not late, f"patching.x2_steps {late} lie outside X2's {self.phases.x2.steps} steps.")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, as written beside every run."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

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
    def from_dict(cls, data: Mapping[str, Any]) -> StudyConfig:
        """The study written by `to_dict`; unknown keys are named beside the valid ones."""
        return _built(cls, data, "the config")


_PARTS: dict[str, Any] = {
    "task": AliasConfig,
    "model": ToyConfig,
    "phases": PhasesConfig,
    "schedule": ScheduleConfig,
    "patching": PatchingConfig,
    "trainer": TrainerConfig,
}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def identifies(operation: Operation, multipliers: tuple[int, ...], modulus: int) -> bool:
    """Whether the answers under these multipliers together tell every integer from every other.

    For products this holds when the least common multiple of modulus / gcd(d, modulus) is the modulus.
    """
    if operation == "prod":
        return math.lcm(*(modulus // math.gcd(d, modulus) for d in multipliers)) == modulus
    answers = {tuple(answer(operation, x, d, modulus) for d in multipliers) for x in range(modulus)}
    return len(answers) == modulus
