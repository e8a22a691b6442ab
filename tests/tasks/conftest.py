"""Small alias tasks."""

from collections.abc import Callable
from typing import Any

import pytest

from dynamics.config import AliasConfig, PatchingConfig, PhaseConfig, PhasesConfig, PrimaryConfig, StudyConfig
from dynamics.tasks import AliasTask

TASK_KEYS = set(AliasConfig.__dataclass_fields__)


@pytest.fixture
def alias_task() -> Callable[..., AliasTask]:
    """A maker of tasks; keywords go to the task's config, `batch_size` and `study_seed` elsewhere."""

    def make(batch_size: int = 16, study_seed: int = 0, **changes: Any) -> AliasTask:
        assert set(changes) <= TASK_KEYS
        task = {"modulus": 12, "multipliers": (2, 3, 4, 6), "train_multipliers": 2, **changes}
        phases = PhasesConfig(
            pretrain=PhaseConfig(steps=40),
            x1=PhaseConfig(steps=50),
            x2=PhaseConfig(steps=60),
            batch_size=batch_size,
        )
        patching = PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0))
        return AliasTask(
            StudyConfig(task=AliasConfig(**task), phases=phases, patching=patching, seed=study_seed)
        )

    return make
