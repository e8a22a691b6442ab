"""A run that never came to a checkpoint gives way to a new one; what holds a checkpoint does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from checkpoints import Checkpoint, Trajectory, TrajectoryError, TrajectoryWriter


def test_a_run_without_checkpoints_is_begun_anew_under_another_config(tmp_path):
    TrajectoryWriter.create(tmp_path, {"lr": 1.0}).close()
    with TrajectoryWriter.create(tmp_path, {"lr": 2.0}, {"seed": 1}) as writer:
        writer.append(Checkpoint.capture(nn.Linear(1, 1)))
    run = Trajectory.open(tmp_path)
    assert (run.config, run.provenance, run.steps) == ({"lr": 2.0}, {"seed": 1}, (0,))
    with pytest.raises(TrajectoryError, match="already holds a run"):
        TrajectoryWriter.create(tmp_path, {"lr": 3.0})


def test_a_run_that_another_writer_has_begun_is_left_to_it(tmp_path):
    with TrajectoryWriter.create(tmp_path, {"lr": 1.0}):
        with pytest.raises(TrajectoryError, match="is being written"):
            TrajectoryWriter.create(tmp_path, {"lr": 2.0})
        assert Trajectory.open(tmp_path).config == {"lr": 1.0}


def test_a_manifest_that_cannot_be_read_is_not_written_over(tmp_path):
    (tmp_path / "manifest.json").write_text("half of a manif")
    with pytest.raises(TrajectoryError, match="not a readable manifest"):
        TrajectoryWriter.create(tmp_path, {})
    assert (tmp_path / "manifest.json").read_text() == "half of a manif"


def test_an_import_leaves_a_run_of_ones_own_alone(tmp_path):
    TrajectoryWriter.create(tmp_path / "own", {"lr": 1.0}).close()
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "m_1.pt")
    with pytest.raises(TrajectoryError, match="holds another run"):
        Trajectory.from_state_dicts(tmp_path / "m_1.pt", tmp_path / "own")
