"""A run small enough to train in a second or two."""

import warnings

import pytest

from dynamics.config import (
    AliasConfig,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    PrimaryConfig,
    ScheduleConfig,
    StudyConfig,
    ToyConfig,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch  # noqa: F401 - its imports warn of their own accord


@pytest.fixture
def config() -> StudyConfig:
    return StudyConfig(
        task=AliasConfig(modulus=8, multipliers=(2, 3, 4), train_multipliers=2),
        model=ToyConfig(n_layers=1, n_heads=2, d_model=16, d_head=8, d_mlp=16),
        phases=PhasesConfig(
            pretrain=PhaseConfig(12, warmup=3), x1=PhaseConfig(10), x2=PhaseConfig(8), batch_size=16
        ),
        schedule=ScheduleConfig(per_decade=2, dense=1, evaluate_every=4),
        patching=PatchingConfig(x2_steps=(0, 5), primary=PrimaryConfig(x2_step=5)),
        seed=3,
    )
