"""`dynamics compare` as a user meets it."""

from pathlib import Path

import numpy as np
import pytest

from dynamics import results
from tests.cli.calling import dynamics

pytestmark = pytest.mark.slow

BRIEF = [
    "--preset=smoke",
    "--task.modulus=8",
    "--task.multipliers=[2, 3, 4]",
    "--task.train_multipliers=2",
    "--phases.pretrain.steps=10",
    "--phases.x1.steps=10",
    "--phases.x2.steps=10",
    "--schedule.per_decade=1",
    "--schedule.dense=0",
    "--patching.x2_steps=[0]",
    "--patching.primary.x2_step=0",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "run"
    done = dynamics("fit", "--out", folder, *BRIEF)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_steps_are_compared_stored_or_not(run):
    done = dynamics("compare", run, "--from", 3, "--to", 25)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Step 3 to 25\n\nanswers by set\n")
    folder, figures = run / "results" / "compare-3-25", run / "figures" / "compare-3-25"
    assert done.stdout.endswith(f"Datasets are in {folder}, figures in {figures}.\n")
    weights, sets = (results.load(folder / f"{name}.h5") for name in ("weights", "sets"))
    assert (weights["distance"].values > 0).all()
    assert set(sets["example"].values) == {"DtQ1", "DfQ2", "Dt3", "Df4", "heldout"}
    assert (figures / "moved.png").stat().st_size > 10_000
    assert dynamics("compare", run, "--from", 3, "--to", 25).stdout == done.stdout


def test_every_checkpoint_is_compared_with_its_neighbour(run):
    done = dynamics("compare", run, "--every", "--steps", 0, 10, 15, 20, 30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("change points in this run\n")
    (folder,) = (run / "results").glob("compare-every-5-*")
    weights = results.load(folder / "weights.h5")
    assert weights["previous"].values.tolist() == [0, 10, 15, 20]
    assert weights["step"].values.tolist() == [10, 15, 20, 30]
    assert np.isfinite(results.load(folder / "alignment.h5")["own"].values).any()
    assert (run / "figures" / folder.name / "curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "3"], "give --from STEP and --to STEP, or --every"),
        ([], "give --from STEP and --to STEP, or --every"),
        (["--every", "--from", "3", "--to", "4"], "give --from STEP and --to STEP, or --every"),
        (["--from", "3", "--to", "4", "--steps", "3"], "give --from STEP and --to STEP, or --every"),
        (["--from", "3", "--to", "31"], "lies outside the run's steps"),
        (["--every", "--steps", "10", "20"], "at least 3"),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments, said):
    done = dynamics("compare", run, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
