"""Two checkpoints of a small transformer, and a short run."""

from __future__ import annotations

import pytest

from checkpoints import Checkpoint, Trajectory
from dynamics.batch import Batch
from dynamics.recipe import Recipe
from tests.zoo.comparison_models import jittered, questions, short_run, small_recipe


@pytest.fixture
def recipe() -> Recipe:
    return small_recipe()


@pytest.fixture
def pair(recipe: Recipe) -> tuple[Checkpoint, Checkpoint]:
    """States at steps 3 and 5, far from the weights that the recipe's model holds."""
    drawn = Checkpoint.capture(recipe.model)
    return jittered(drawn, 10, 3), jittered(drawn, 50, 5)


@pytest.fixture
def sets() -> dict[str, Batch]:
    return {"first": questions(1), "second": questions(2, rows=3)}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    return short_run(tmp_path_factory.mktemp("comparison") / "run")
