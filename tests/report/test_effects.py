"""Maps of sites, agreement and transfer: each number of a picture is that of its Dataset."""

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from dynamics import results, statistics
from dynamics.report import effects
from dynamics.report.runs import open_run
from tests.zoo import reported_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(reported):
    return open_run(reported[0])


def named(run, verb):
    return next(result for result in run.results if result.verb == verb)


def test_a_map_of_raw_effects_shows_their_summary(run):
    result = named(run, "patch_gradients")
    figure = effects.site_map(run, result)
    xr.testing.assert_identical(figure.dataset, statistics.summarize(result.dataset))
    assert "placebo 0" not in figure.dataset["site"]
    assert figure.dataset["placebo"].sel(site="attn 0").notnull().all()
    assert figure.settings["chosen"] == {
        "level": "components",
        "optimizer": "fresh",
        "measure": "correct_logit",
    }


def test_a_summary_is_shown_as_it_is_and_other_quantities_by_their_variables_of_sites(run):
    summary = statistics.summarize(reported_runs.patched(0))
    assert effects.summarised(summary) is summary
    weights = next(r for r in run.results if r.path.stem == "weights")
    mixed = weights.dataset.assign(clip=("step", np.ones(5)))
    assert list(effects.summarised(mixed)) == ["relative"]
    assert effects.site_map(run, weights).settings["layouts"] == ["columns"]


@pytest.mark.parametrize(
    ("stem", "mapped"),
    [("patch_gradients", True), ("weights", True), ("scores", False), ("alignment", False), ("odd", False)],
)
def test_what_has_a_number_for_each_site_can_be_mapped(run, stem, mapped):
    result = next(r for r in run.results if r.path.stem == stem)
    assert effects.can_be_mapped(result.dataset) == mapped


def test_an_account_is_no_map(run):
    account = named(run, "attribute_training").dataset
    without = account.isel(example=0, source=0, drop=True)
    assert results.is_account(without)
    assert not effects.can_be_mapped(without)


def test_points_are_means_over_examples_and_ranks_those_of_scipy(run):
    exact, attributed = named(run, "patch_gradients"), named(run, "attribute_step")
    figure = effects.agreement(run, exact, attributed)
    at = {"optimizer": "fresh", "step": 10, "measure": "correct_logit"}
    one = exact.dataset["effect"].sel(at).isel(site=slice(2, 6)).mean("example")
    other = attributed.dataset["attribution"].sel(at).isel(site=slice(2, 6)).mean("example")
    shown = figure.dataset.sel(at).isel(site=slice(2, 6))
    np.testing.assert_allclose(shown["exact"], one)
    np.testing.assert_allclose(shown["attributed"], other)
    rank = figure.settings["rank"]
    labels = {**at, "level": "heads"}
    place = 0
    for dim in rank["variables"]["spearman"]["dims"]:
        place = place * len(rank["dims"][dim]) + rank["dims"][dim].index(labels[dim])
    expected = scipy.stats.spearmanr(one, other).statistic
    assert rank["variables"]["spearman"]["values"][place] == pytest.approx(expected, abs=1e-6)


def test_two_results_that_share_no_step_have_no_agreement(run):
    exact, attributed = named(run, "patch_gradients"), named(run, "attribute_step")
    elsewhere = type(exact)(exact.path, exact.dataset.assign_coords(step=[1, 2, 3]))
    assert effects.agreement(run, elsewhere, attributed) is None
    assert len(list(effects.agreements(run, run.results))) == 1


def test_a_transfer_begins_at_the_last_checkpoint_put_into_the_first(run):
    figure = effects.transfer(run, named(run, "patch_parameters"))
    assert figure.settings["chosen"]["source_step"] == 57
    assert effects.is_transfer(figure.dataset)
