"""The runs that sweeps are tried on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from checkpoints import Trajectory
from dynamics.sweeps import planning, working
from tests.zoo.sweep_runs import trained


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[Trajectory]:
    return [trained(tmp_path_factory.mktemp("runs") / f"seed {seed}", seed) for seed in (0, 1)]


@pytest.fixture
def run(runs) -> Trajectory:
    return runs[0]


@pytest.fixture
def small_units(monkeypatch):
    """Units of one contrast, so that there are many."""
    monkeypatch.setattr(planning, "UNIT_REPLAYS", 1)


@pytest.fixture(scope="package")
def two_workers() -> Iterator:
    """A client of two workers, which import everything once; they end with these tests: idle, they cost too."""
    with working.local(2) as client:
        yield client


@pytest.fixture
def workers_at_hand(two_workers, monkeypatch):
    """`workers=2` finds two that have started already."""

    def local(n):
        assert n == 2
        return nullcontext(two_workers)

    monkeypatch.setattr(working, "local", local)
