"""Curves, answers, alignment and events: each number of a picture is that of its Dataset."""

import numpy as np
import pytest
import xarray as xr

from dynamics import results
from dynamics.comparison import when
from dynamics.report import behaviour
from dynamics.report.runs import Result, open_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(reported):
    return [open_run(folder) for folder in reported]


def stem(run, name):
    return next(r for r in run.results if r.path.stem == name)


def test_the_curves_are_the_runs_own_beside_phases_guesses_and_checkpoints(runs):
    figure = behaviour.curves(runs[0])
    xr.testing.assert_identical(figure.dataset, runs[0].curves)
    assert figure.settings["phases"] == {"pretrain": 0, "x1": 3, "x2": 7}
    assert figure.settings["checkpoints"] == [0, 3, 7, 10, 57]
    assert set(figure.settings["guesses"]) == {"uniform guess", "constant answer"}


def test_each_alias_has_its_answers_before_and_after_the_last_phase(runs):
    scored = stem(runs[0], "aliases").dataset
    table = behaviour.answers(runs[0], stem(runs[0], "aliases")).dataset
    np.testing.assert_array_equal(table["accuracy_before"], scored["accuracy"].sel(step=7))
    np.testing.assert_array_equal(table["correct_logit_after"], scored["correct_logit"].sel(step=57))
    first = when(scored["accuracy"].isel(example=1))["at"]
    np.testing.assert_array_equal(table["changed_at"].isel(example=1), first)
    assert table["set"].values.tolist() == ["Dt3", "Dt3", "Df4", "Df4"]


def test_an_alias_is_credited_with_what_its_definitions_wrote(runs):
    account = stem(runs[0], "account-7-17-components-integers").dataset
    table = behaviour.answers(runs[0], stem(runs[0], "aliases")).dataset
    gap = results.difference(account.isel(measure=0), "Dt3", "Df4")["attribution"]
    components = gap.isel(site=slice(0, 2))
    for example, integer in zip(table["example"].values, table["integer"].values, strict=True):
        expected = components.sel(source=f"definition of alias {integer}").sum()
        assert float(table["written"].sel(example=example)) == pytest.approx(float(expected))
    assert table["written"].attrs["units"] == "logit"


def test_single_examples_are_told_from_sets_by_their_coordinates(runs):
    assert behaviour.names_examples(stem(runs[0], "aliases").dataset)
    assert not behaviour.names_examples(stem(runs[0], "scores").dataset)


def test_alignment_is_the_mean_over_a_sets_aliases(runs):
    result = stem(runs[0], "alignment")
    figure = behaviour.alignment(runs[0], result)
    expected = result.dataset["own"].isel(example=slice(2, 4)).mean("example")
    np.testing.assert_allclose(figure.dataset["own"].sel(set="Df4").transpose(*expected.dims), expected)


def test_of_one_run_events_are_its_first_changes(runs):
    (figure,) = behaviour.events(runs[:1])
    assert figure.dataset["at"].sel(example="Dt3") == 12


def test_of_several_runs_events_have_intervals_and_an_order(runs):
    changes, order = behaviour.events(runs)
    assert changes.dataset["n"].values.tolist() == [2] * 5
    assert order.dataset.sizes["pair"] == 10
    assert np.allclose(order.dataset["later"], 0)


def test_curves_of_several_runs_stand_side_by_side(runs):
    figure = behaviour.multiples(runs)
    for run in runs:
        xr.testing.assert_equal(
            figure.dataset["accuracy"].sel(seed=run.name, drop=True), run.curves["accuracy"]
        )
    assert behaviour.multiples(runs[:1]) is None


def test_examples_without_a_phase_are_compared_from_their_first_step(own):
    run = open_run(own)
    steps = {"step": [0, 2, 4], "example": ["one", "two"], "kind": ("example", ["x", "y"])}
    scored = xr.Dataset({"accuracy": (("step", "example"), np.arange(6.0).reshape(3, 2))}, steps)
    table = behaviour.answers(run, Result(own / "results" / "scored.h5", scored)).dataset
    assert table["accuracy_before"].values.tolist() == [0, 1]
    assert table["accuracy_after"].values.tolist() == [4, 5]
    assert "written" not in table
