"""Stacked areas: what they add up to."""

import numpy as np
import pytest

from dynamics.report import accounts
from tests.zoo import reported_runs


@pytest.fixture
def account():
    return reported_runs.accounted(np.random.default_rng(5))


@pytest.mark.parametrize("kind", ["site", "source"])
def test_areas_add_up_to_the_measures_change(account, kind):
    shown = accounts.written(account, kind)
    np.testing.assert_allclose(shown["written"].sum(kind), shown["change"], atol=1e-12)
    assert shown["written"].attrs["units"] == "logit"


def test_the_difference_of_the_two_sets_comes_first(account):
    shown = accounts.written(account, "site")
    assert shown["example"].values.tolist() == ["Dt3 − Df4", "Dt3", "Df4"]
    gap, one, other = (shown["written"].isel(example=i) for i in range(3))
    np.testing.assert_allclose(gap, one - other)


def test_a_long_account_keeps_its_ends_and_its_running_sums(account, monkeypatch):
    monkeypatch.setattr(accounts, "POINTS", 4)
    shown = accounts.written(account, "source")
    assert shown["step"].values.tolist() == [7, 10, 13, 16]
    expected = account["attribution"].sum("site").sel(step=slice(7, 13)).sum("step")
    np.testing.assert_allclose(
        shown["written"].sel(step=13, example="Dt3").transpose("measure", "source"),
        expected.sel(example="Dt3").transpose("measure", "source"),
    )
