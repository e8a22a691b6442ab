"""The configs of the small languages: indirect objects (ioi), acronyms, facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dynamics.config.checks import check_seed, choice, require
from dynamics.config.parts import PhaseConfig, Phases, RunConfig, ScheduleConfig, ToyConfig, TrainerConfig

IoiName = Literal["ioi"]
AcronymsName = Literal["acronyms"]
FactsName = Literal["facts"]


def _check_count(name: str, value: int, least: int, most: int, of: str) -> None:
    require(least <= value <= most, f"task.{name} is {value}; it must be {least}..{most}, {of}.")


@dataclass(frozen=True)
class IoiConfig:
    """Indirect objects (tasks/ioi.py): "When A and B went to the store , B gave a ring to" -> A.

    Attributes:
        name: of the task.
        n_names: names in use.
        heldout_fraction: share of the (unordered) pairs of names that is never trained on.
        n_prompts: training prompts drawn.
        seed: draws names, pairs and prompts; None takes the run's.
        order_seed: draws the order of the rows; None takes the run's.
    """

    name: IoiName = "ioi"
    n_names: int = 32
    heldout_fraction: float = 0.2
    n_prompts: int = 20_000
    seed: int | None = None
    order_seed: int | None = None

    def __post_init__(self) -> None:
        choice("task.name", self.name, IoiName)
        _check_count("n_names", self.n_names, 6, 48, "the names there are (tasks/words.py)")
        pairs = self.n_names * (self.n_names - 1) // 2
        require(
            1 <= round(self.heldout_fraction * pairs) < pairs,
            f"task.heldout_fraction {self.heldout_fraction} of {pairs} pairs of names leaves none to train or to "
            "test on.",
        )
        require(self.n_prompts >= 1, f"task.n_prompts is {self.n_prompts}; it must be at least 1.")
        check_seed("task.seed", self.seed)
        check_seed("task.order_seed", self.order_seed)


@dataclass(frozen=True)
class AcronymsConfig:
    """Acronyms (tasks/acronyms.py): "The Chief Executive Officer (" -> C, E, O.

    Attributes:
        name: of the task.
        n_words: words per initial.
        n_prompts: triples of words drawn for training; every other triple is held out.
        seed: draws words and triples; None takes the run's.
        order_seed: draws the order of the rows; None takes the run's.
    """

    name: AcronymsName = "acronyms"
    n_words: int = 6
    n_prompts: int = 10_000
    seed: int | None = None
    order_seed: int | None = None

    def __post_init__(self) -> None:
        choice("task.name", self.name, AcronymsName)
        _check_count("n_words", self.n_words, 1, 8, "the words per initial there are (tasks/words.py)")
        most = (22 * self.n_words) ** 3 // 2
        _check_count("n_prompts", self.n_prompts, 1, most, "half of all triples")
        check_seed("task.seed", self.seed)
        check_seed("task.order_seed", self.order_seed)


@dataclass(frozen=True)
class FactsConfig:
    """Facts (tasks/facts.py): "The capital of Spain is" -> Madrid; some capitals are stated late in training.

    Attributes:
        name: of the task.
        n_subjects: countries in use.
        n_late: how many of them have their capital stated in the phase `late` alone.
        late_templates: in how many of the four templates a late fact is stated; questions use the others.
        late_copies: how often each of these statements stands among the rows of the phase `late`.
        seed: draws subjects and splits; None takes the run's.
        order_seed: draws the order of the rows; None takes the run's.
    """

    name: FactsName = "facts"
    n_subjects: int = 40
    n_late: int = 8
    late_templates: int = 1
    late_copies: int = 3
    seed: int | None = None
    order_seed: int | None = None

    def __post_init__(self) -> None:
        choice("task.name", self.name, FactsName)
        _check_count("n_subjects", self.n_subjects, 4, 44, "the countries there are (tasks/words.py)")
        _check_count("n_late", self.n_late, 1, self.n_subjects - 2, "two fewer than n_subjects")
        _check_count("late_templates", self.late_templates, 1, 3, "one fewer than there are templates")
        require(self.late_copies >= 1, f"task.late_copies is {self.late_copies}; it must be at least 1.")
        check_seed("task.seed", self.seed)
        check_seed("task.order_seed", self.order_seed)


@dataclass(frozen=True)
class OnePhaseConfig(Phases):
    """One stretch of training with one AdamW.

    Attributes:
        learn: the phase.
        batch_size, betas, weight_decay, max_grad_norm: clipping is by total norm.
    """

    learn: PhaseConfig = PhaseConfig(steps=600, warmup=50)
    batch_size: int = 64
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class LatePhasesConfig(Phases):
    """Most facts first, then all of them and the late ones; one AdamW goes through both.

    Attributes:
        learn, late: the two phases, in this order.
        batch_size, betas, weight_decay, max_grad_norm: shared by both; clipping is by total norm.
    """

    goes_on: ClassVar[tuple[str, ...]] = ("late",)
    learn: PhaseConfig = PhaseConfig(steps=600, warmup=50)
    late: PhaseConfig = PhaseConfig(steps=300)
    batch_size: int = 64
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class _LanguageRun(RunConfig):
    """Everything a run of a language whose prompts have one length needs to be trained again."""

    length: ClassVar[int]
    task: Any
    model: ToyConfig
    phases: Phases = OnePhaseConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    trainer: TrainerConfig = TrainerConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks that concern several parts."""
        super().__post_init__()
        require(
            self.model.n_ctx >= self.length,
            f"model.n_ctx is {self.model.n_ctx}; the prompts of this task have {self.length} tokens.",
        )


@dataclass(frozen=True)
class IoiRun(_LanguageRun):
    """Everything a run of the task `ioi` needs to be trained again."""

    length: ClassVar[int] = 14
    task: IoiConfig = IoiConfig()
    model: ToyConfig = ToyConfig(n_layers=4, n_heads=4, d_model=64, d_head=16, d_mlp=128, n_ctx=14)
    phases: OnePhaseConfig = OnePhaseConfig()


@dataclass(frozen=True)
class AcronymsRun(_LanguageRun):
    """Everything a run of the task `acronyms` needs to be trained again."""

    length: ClassVar[int] = 7
    task: AcronymsConfig = AcronymsConfig()
    model: ToyConfig = ToyConfig(n_layers=4, n_heads=4, d_model=64, d_head=16, d_mlp=128, n_ctx=7)
    phases: OnePhaseConfig = OnePhaseConfig()


@dataclass(frozen=True)
class FactsRun(_LanguageRun):
    """Everything a run of the task `facts` needs to be trained again."""

    length: ClassVar[int] = 5
    task: FactsConfig = FactsConfig()
    model: ToyConfig = ToyConfig(n_layers=4, n_heads=4, d_model=64, d_head=16, d_mlp=128, n_ctx=5)
    phases: LatePhasesConfig = LatePhasesConfig()
