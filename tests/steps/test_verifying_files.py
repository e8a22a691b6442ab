"""Every file of a run is checked, or said not to be."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from torch import nn

from checkpoints import Checkpoint, Trajectory, TrajectoryWriter
from dynamics import results, steps
from tests.zoo.older_runs import as_schema_1


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with each kind of file."""
    folder = tmp_path / "run"
    with TrajectoryWriter.create(folder, {"seed": 1}) as writer:
        for step in (0, 3):
            writer.append(Checkpoint.capture(nn.Linear(2, 2), step=step))
        writer.write_file("config.yaml", b"seed: 1\n")
        writer.write_file("metrics.csv", b"step,loss\n0,1.0\n")
    effects = xr.Dataset({"effect": ("example", np.arange(3.0))})
    results.save(effects, folder / "results" / "one.h5")
    results.save(effects, folder / "results" / "deep" / "two.h5")
    (folder / "findings.md").write_text("None.")
    return folder


CHECKED = {
    "config.yaml",
    "metrics.csv",
    "results/deep/two.h5",
    "results/one.h5",
    "trajectory/step-00000000.h5",
    "trajectory/step-00000003.h5",
}


def test_what_carries_a_checksum_is_checked_and_the_rest_is_named(run):
    report = steps.verify_files(Trajectory.open(run))
    assert (set(report.checked), report.unchecked, report.problems) == (CHECKED, ("findings.md",), ())


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_a_flipped_bit_in_any_of_them_is_a_problem_that_names_the_file(run, name):
    path = run / name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    (problem,) = steps.verify_files(Trajectory.open(run)).problems
    assert path.name in problem


def test_what_older_versions_wrote_is_unchecked(run):
    as_schema_1(run)
    shutil.copy(run / "results" / "one.h5", run / "results" / "zero.h5")
    xr.Dataset({"effect": ("example", [1.0])}).to_netcdf(run / "results" / "older.h5", engine="h5netcdf")
    report = steps.verify_files(Trajectory.open(run))
    unlisted = {"config.yaml", "metrics.csv", "manifest.json", "results/older.h5", "findings.md"}
    assert set(report.unchecked) == unlisted
    assert report.problems == ()
