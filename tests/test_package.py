"""What `dynamics` gives by name beside its own nouns: those of trajectories, and its version."""

from __future__ import annotations

import tomllib
from pathlib import Path

import checkpoints
import dynamics as dy


def test_the_nouns_of_trajectories_are_those_of_checkpoints() -> None:
    for name in ("Checkpoint", "Trajectory", "TrajectoryWriter"):
        assert getattr(dy, name) is getattr(checkpoints, name)


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((Path(dy.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert dy.__version__ == project["project"]["version"]
