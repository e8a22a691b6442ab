"""The runs that sweeps are tried on."""

from __future__ import annotations

import pytest

from checkpoints import Trajectory
from dynamics.sweeps import planning
from tests.zoo.sweep_runs import trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Trajectory]:
    return [trained(tmp_path_factory.mktemp("runs") / f"seed {seed}", seed) for seed in (0, 1)]


@pytest.fixture
def run(runs) -> Trajectory:
    return runs[0]


@pytest.fixture
def small_units(monkeypatch):
    """Units of one contrast, so that there are many."""
    monkeypatch.setattr(planning, "UNIT_REPLAYS", 1)
