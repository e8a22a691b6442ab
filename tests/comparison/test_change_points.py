"""Change points against brute force, planted ones found, and intervals over seeds."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics.comparison import bend, level_changes, order_of_events, when


def by_brute_force(y, most):
    """The division of least BIC, every one tried."""
    n = len(y)
    best = (np.inf, ())
    for k in range(most + 1):
        for cuts in combinations(range(1, n), k):
            parts = np.split(y, cuts)
            if min(map(len, parts)) < 2:
                continue
            rss = sum(((part - part.mean()) ** 2).sum() for part in parts)
            best = min(best, (n * np.log(rss / n) + (2 * k + 1) * np.log(n), cuts))
    return best


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(4, 12), st.integers(0, 3))
def test_levels_are_the_best_of_all_divisions(seed, n, most):
    generator = np.random.default_rng(seed)
    y = generator.normal(size=n) + 3 * (np.arange(n) >= generator.integers(1, n))
    found = level_changes(np.arange(n), y, most)
    bic, cuts = by_brute_force(y, most)
    assert found.at.tolist() == list(cuts)
    expected = np.concatenate([np.full(len(p), p.mean()) for p in np.split(y, cuts)])
    np.testing.assert_allclose(found.fitted, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.gain, by_brute_force(y, 0)[0] - bic, atol=1e-8)


def test_planted_levels_are_found_at_the_first_point_of_each():
    x = np.array([0, 1, 2, 5, 10, 20, 50, 100, 200, 500.0])
    y = np.array([0, 0.1, 0, 0.1, 3, 3.1, 3, 7, 7.1, 7])
    assert level_changes(x, y, most=2).at.tolist() == [10, 100]
    assert level_changes(x, y, most=5).at.tolist() == [10, 100]
    assert level_changes(x, y).at.tolist() in ([10], [100])


def test_a_constant_curve_has_no_change_and_missing_points_are_left_out():
    for constant in (1 / 3, 0.0, 1e-200):
        assert level_changes(np.arange(9), np.full(9, constant)).at.size == 0
        assert bend(np.arange(9), np.full(9, constant)).at.size == 0
    y = np.array([0, 0, np.nan, 0, 1, np.nan, 1, 1.0])
    assert level_changes(np.arange(8), y + 1e-3 * np.cos(np.arange(8))).at.tolist() == [4]
    assert level_changes([3], [1.0]).at.size == 0


def test_noise_alone_is_seldom_called_a_change():
    generator = np.random.default_rng(0)
    called = [level_changes(np.arange(30), generator.normal(size=30)).at.size for _ in range(300)]
    assert np.mean(called) < 0.25


def test_a_bend_is_where_the_fit_of_all_is_best():
    generator = np.random.default_rng(2)
    x = np.sort(generator.uniform(0, 10, 25))
    y = 1 + 0.5 * x - 2 * np.maximum(0, x - x[14]) + 0.05 * generator.normal(size=25)
    found = bend(x, y)
    assert found.at.tolist() == [x[14]]

    def rss(t):
        a = np.stack([np.ones(25), x, np.maximum(0, x - t)], 1)
        solution = np.linalg.solve(a.T @ a, a.T @ y)
        return ((y - a @ solution) ** 2).sum()

    assert min(x[2:-2], key=rss) == found.at[0]
    np.testing.assert_allclose(((y - found.fitted) ** 2).sum(), rss(found.at[0]), rtol=1e-8)
    line = scipy.stats.linregress(x, y)
    residual = ((y - line.intercept - line.slope * x) ** 2).sum()
    expected = 25 * np.log(residual / rss(found.at[0])) - 2 * np.log(25)
    np.testing.assert_allclose(found.gain, expected, rtol=1e-8)


def test_a_straight_line_has_no_bend():
    generator = np.random.default_rng(3)
    x = np.arange(40.0)
    assert bend(x, 2 * x + generator.normal(size=40)).at.size == 0
    assert bend(x[:4], x[:4]).at.size == 0


def curves():
    """Four seeds that change at 3, 5 and 4, and not at all; two sets."""
    noise = 0.01 * np.random.default_rng(4).normal(size=(4, 10))
    steps = np.arange(10)
    y = np.stack([steps >= 3, 2 * (steps >= 5), steps >= 4, np.zeros(10)]) + noise
    dims = ("seed", "set", "step")
    coords = {"step": steps, "seed": [5, 6, 7, 8]}
    return xr.DataArray(np.stack([y, -y], 1), dims=dims, coords=coords, attrs={"units": "share"})


def test_when_gives_each_seed_its_change_and_the_interval_over_those_that_have_one():
    found = when(curves())
    np.testing.assert_array_equal(found["at"].isel(set=0), [3, 5, 4, np.nan])
    np.testing.assert_allclose(found["change"].isel(set=1)[:3], [-1, -2, -1], atol=0.02)
    assert found["change"].attrs["units"] == "share"
    assert (found["gain"] > 0).sum() == 6
    low, high = scipy.stats.t.interval(0.9, 2, 4, scipy.stats.sem([3, 5, 4]))
    ninety = when(curves(), confidence=0.9).isel(set=0)
    np.testing.assert_allclose([float(ninety[n]) for n in ("mean", "low", "high", "n")], [4, low, high, 3])


def test_when_takes_any_fit_and_one_curve_without_seeds():
    one = curves().isel(seed=0, set=0, drop=True)
    assert float(when(one)["at"]) == 3
    assert "mean" not in when(one)
    assert float(when(one, partial(level_changes, most=0))["gain"]) == 0
    assert np.isnan(when(one, partial(level_changes, most=0))["at"])
    with pytest.raises(ValueError, match="expected 'step'"):
        when(one.rename(step="row"))


def test_events_are_ordered_pair_by_pair_over_the_runs_that_have_both():
    events = {"pattern": [1, 2, 3, np.nan], "alignment": [4, 4, 9, 5], "gap": [10, 12, 14, 11]}
    found = order_of_events(events)
    gaps = np.array([3, 2, 6])
    low, high = scipy.stats.t.interval(0.95, 2, gaps.mean(), scipy.stats.sem(gaps))
    one = found.sel(example="pattern", other="alignment")
    np.testing.assert_allclose([one["later"], one["low"], one["high"], one["n"]], [gaps.mean(), low, high, 3])
    back = found.sel(example="alignment", other="pattern")
    np.testing.assert_allclose([back["later"], back["low"], back["high"]], [-gaps.mean(), -high, -low])
    assert int(found["n"].sel(example="alignment", other="gap")) == 4


@pytest.mark.parametrize(("x", "y"), [([1, 1], [0, 0]), ([1, 2], [0]), ([2, 1], [0, 1])])
def test_points_that_are_no_curve_are_refused(x, y):
    with pytest.raises(ValueError, match="one y for each rising x"):
        level_changes(x, y)
    with pytest.raises(ValueError, match="no point"):
        bend([1, 2], [np.nan, np.nan])
