"""Runs to report on, made once in a session."""

from pathlib import Path

import pytest

from tests.zoo import reported_runs


@pytest.fixture(scope="session")
def reported(made_once) -> list[Path]:
    """Two runs with every kind of result; nobody writes into them."""
    return [
        made_once(f"reported-{seed}", lambda out, seed=seed: reported_runs.make(out, seed)) for seed in (0, 1)
    ]


@pytest.fixture(scope="session")
def own(made_once) -> Path:
    """A run of a loop of one's own with a single result; nobody writes into it."""
    return made_once("reported-own", reported_runs.make_own)
