"""Runs in miniature that several scripts look at, each trained once for all tests."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import dynamics as dy
from dynamics.config import (
    AliasConfig,
    FactsConfig,
    FactsRun,
    LatePhasesConfig,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    RunConfig,
    ScheduleConfig,
    StudyConfig,
    ToyConfig,
)


@pytest.fixture(scope="session")
def fitted() -> Callable[[RunConfig, Path], Path]:
    """Trains the run of a config into a folder, and returns that."""

    def fit(config: RunConfig, folder: Path) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's
            dy.training.fit(config, folder)
        return folder

    return fit


@pytest.fixture(scope="session")
def alias_config() -> StudyConfig:
    """Aliases of eight integers; X2 is longer than the 20 steps after which scripts in miniature look last."""
    return StudyConfig(
        task=AliasConfig(modulus=8, multipliers=(2, 3, 4), train_multipliers=2),
        model=ToyConfig(n_layers=2, n_heads=2, d_model=32, d_head=16, d_mlp=64),
        phases=PhasesConfig(
            pretrain=PhaseConfig(20, warmup=5), x1=PhaseConfig(20, warmup=5), x2=PhaseConfig(24)
        ),
        schedule=ScheduleConfig(per_decade=2, dense=1, evaluate_every=1000),
        patching=PatchingConfig(x2_steps=(0, 10, 20)),
    )


@pytest.fixture(scope="session")
def alias_runs(fitted, alias_config, made_once) -> list[Path]:
    """Two runs of the aliases, seeds 0 and 1."""
    configs = [replace(alias_config, seed=seed) for seed in (0, 1)]
    return [made_once(f"seed-{c.seed}", partial(fitted, c)) for c in configs]


@pytest.fixture(scope="session")
def facts_runs(fitted, made_once) -> list[Path]:
    """Two runs of the facts, seeds 1 and 2; eleven steps and more are kept from the tenth on."""
    config = FactsRun(
        task=FactsConfig(n_subjects=6, n_late=2),
        model=ToyConfig(n_layers=2, n_heads=2, d_model=16, d_head=8, d_mlp=16, n_ctx=5),
        phases=LatePhasesConfig(learn=PhaseConfig(60, warmup=10), late=PhaseConfig(20)),
        schedule=ScheduleConfig(per_decade=14, dense=0, evaluate_every=1000),
    )
    configs = [replace(config, seed=seed) for seed in (1, 2)]
    return [made_once(f"facts-{c.seed}", partial(fitted, c)) for c in configs]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
