"""The config of the alias study: task, phases, which steps are replayed, and all of it together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from dynamics.config.checks import built, check_seed, choice, require
from dynamics.config.parts import PhaseConfig, Phases, RunConfig, ScheduleConfig, ToyConfig, TrainerConfig

Operation = Literal["prod", "sum", "ssq"]
Roles = Literal["drawn", "exchanged"]
Tags = Literal["by_set", "random"]
OptimizerState = Literal["stored", "fresh"]
Level = Literal["layers", "components", "heads", "circuits", "matrices", "up_to_layer"]
MeasureName = Literal["correct_logit", "centred_logit", "correct_log_prob", "probability"]


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
        choice("task.operation", self.operation, Operation)
        choice("task.x1_tags", self.x1_tags, Tags)
        choice("task.x2_roles", self.x2_roles, Roles)
        m = self.modulus
        require(m >= 8, f"task.modulus is {m}; below 8 the four sets have fewer than two integers each.")
        require(m % 4 == 0, f"task.modulus {m} does not divide into four equal sets; take a multiple of 4.")
        n = len(self.multipliers)
        require(n > 0, "task.multipliers is empty; questions need at least one.")
        require(len(set(self.multipliers)) == n, f"task.multipliers {self.multipliers} repeats a value.")
        outside = [d for d in self.multipliers if not 0 <= d < m]
        require(not outside, f"task.multipliers {outside} lie outside 0..{m - 1}.")
        require(
            1 <= self.train_multipliers <= n,
            f"task.train_multipliers is {self.train_multipliers}; with {n} multipliers it must be 1..{n}.",
        )
        require(
            any(len({answer(self.operation, x, d, m) for x in range(m)}) > 1 for d in self.multipliers),
            f"task.multipliers {self.multipliers} identify nothing: every integer has the same answer under "
            f"each of them modulo {m}. Take divisors of the modulus larger than 1.",
        )
        for name in ("table_fraction", "heldout_fraction"):
            value = getattr(self, name)
            require(0 <= value < 1, f"task.{name} is {value}; it is a share, at least 0 and below 1.")
        pairs = m * (m + 1) // 2
        require(
            round(self.heldout_fraction * pairs) < pairs,
            f"task.heldout_fraction {self.heldout_fraction} leaves none of {pairs} pairs to train on.",
        )
        check_seed("task.seed", self.seed)
        check_seed("task.order_seed", self.order_seed)
        require(self.definition_copies >= 1, "task.definition_copies must be at least 1.")


@dataclass(frozen=True)
class PhasesConfig(Phases):
    """How the run is trained: pretraining with one AdamW, then X1 and X2 with another one.

    Attributes:
        pretrain, x1, x2: the three phases, in this order.
        stop_pretrain_at: ends pretraining once the loss on held-out table rows is below it (nats); the
            config kept beside the run then holds the number of steps that were taken.
        batch_size, betas, weight_decay, max_grad_norm: shared by all phases; clipping is by total norm.
    """

    goes_on: ClassVar[tuple[str, ...]] = ("x2",)
    pretrain: PhaseConfig = PhaseConfig(steps=1500, warmup=50)
    x1: PhaseConfig = PhaseConfig(steps=3000, warmup=50)
    x2: PhaseConfig = PhaseConfig(steps=2000)
    stop_pretrain_at: float | None = None
    batch_size: int = 64
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.3
    max_grad_norm: float = 1.0

    def stop_below(self, phase: str) -> float | None:
        """`stop_pretrain_at`, in pretraining."""
        return self.stop_pretrain_at if phase == "pretrain" else None


@dataclass(frozen=True)
class PrimaryConfig:
    """The one analysis named before anything is looked at; everything else is exploratory."""

    x2_step: int = 10
    optimizer: OptimizerState = "fresh"
    measure: MeasureName = "correct_logit"
    level: Level = "components"

    def __post_init__(self) -> None:
        choice("patching.primary.optimizer", self.optimizer, OptimizerState)
        choice("patching.primary.measure", self.measure, MeasureName)
        choice("patching.primary.level", self.level, Level)


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
                choice(f"patching.{name}", value, literal)
        object.__setattr__(self, "x2_steps", tuple(self.x2_steps))
        object.__setattr__(self, "primary", built(PrimaryConfig, self.primary, "patching.primary"))
        for name in ("x2_steps", "optimizers", "levels", "measures"):
            values = getattr(self, name)
            require(len(values) > 0, f"patching.{name} is empty; give at least one.")
            require(len(set(values)) == len(values), f"patching.{name} {values} repeats a value.")
        for name, value, where in (
            ("x2_step", self.primary.x2_step, self.x2_steps),
            ("optimizer", self.primary.optimizer, self.optimizers),
            ("measure", self.primary.measure, self.measures),
            ("level", self.primary.level, self.levels),
        ):
            require(value in where, f"patching.primary.{name} is {value!r}, which is not among {where}.")


@dataclass(frozen=True)
class StudyConfig(RunConfig):
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
        super().__post_init__()
        require(
            self.model.n_ctx >= 4,
            f"model.n_ctx is {self.model.n_ctx}; definitions and questions have 4 tokens.",
        )
        late = [s for s in self.patching.x2_steps if not 0 <= s < self.phases.x2.steps]
        require(not late, f"patching.x2_steps {late} lie outside X2's {self.phases.x2.steps} steps.")

    @property
    def replayed(self) -> tuple[int, ...]:
        """The steps of X2 that gradients are exchanged at."""
        return tuple(self.phases.starts["x2"] + step for step in self.patching.x2_steps)


def identifies(operation: Operation, multipliers: tuple[int, ...], modulus: int) -> bool:
    """Whether the answers under these multipliers together tell every integer from every other.

    For products this holds when the least common multiple of modulus / gcd(d, modulus) is the modulus.
    """
    if operation == "prod":
        return math.lcm(*(modulus // math.gcd(d, modulus) for d in multipliers)) == modulus
    answers = {tuple(answer(operation, x, d, modulus) for d in multipliers) for x in range(modulus)}
    return len(answers) == modulus
