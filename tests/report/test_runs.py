"""What a report reads of a run's folder."""

import io

import numpy as np
import pandas as pd
import pytest

from checkpoints import TrajectoryError
from dynamics import results
from dynamics.report.runs import curves, open_run
from tests.zoo import reported_runs


@pytest.mark.slow
def test_all_that_a_run_holds_is_read(reported):
    run = open_run(reported[0])
    assert run.steps == reported_runs.STEPS
    assert run.phases == {"pretrain": 0, "x1": 3, "x2": 7, "end": 507}
    assert set(run.guesses) == {"uniform guess", "constant answer"}
    assert len(run.results) == len(reported_runs.datasets(0))
    assert {result.verb for result in run.results} >= {"patch_gradients", "attribute_training", "odd"}


def test_a_loop_of_ones_own_has_steps_and_results_alone(own):
    run = open_run(own)
    assert (run.steps, run.phases, run.guesses, run.curves) == ((0, 4), {}, {}, None)
    assert [result.verb for result in run.results] == ["mine"]


def test_results_elsewhere_are_read_and_parts_of_sweeps_are_not(own, tmp_path):
    odd = reported_runs.datasets(0)["odd"]
    results.save(odd, tmp_path / "more" / "odd.h5")
    results.save(odd, tmp_path / "more" / "shards" / "part.h5")
    names = [r.path.name for r in open_run(own, [tmp_path / "more"]).results]
    assert names == ["mine.h5", "odd.h5"]
    assert [r.path.name for r in open_run(own, [tmp_path / "more" / "odd.h5"]).results] == names
    with pytest.raises(FileNotFoundError, match="no file or folder of results"):
        open_run(own, [tmp_path / "none"])
    with pytest.raises(TrajectoryError):
        open_run(tmp_path)


def test_curves_are_the_columns_of_each_set_where_they_were_measured():
    text = "step,Dt3_accuracy,Dt3_loss,train_loss\n0,0.5,2.0,3\n1,,,2\n4,0.75,,1\n"
    found = curves(pd.read_csv(io.StringIO(text)))
    assert found["step"].values.tolist() == [0, 4]
    np.testing.assert_array_equal(found["accuracy"].sel(example="Dt3"), [0.5, 0.75])
    np.testing.assert_array_equal(found["loss"].sel(example="Dt3"), [2.0, np.nan])
    assert curves(pd.DataFrame({"step": [0], "train_loss": [1.0]})) is None
