"""Intervals, tests and recovery against other roads to the same numbers."""

from __future__ import annotations

import itertools
import json
import time

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
import xarray as xr

from dynamics import results, statistics


def build(
    n_sites: int = 4,
    n_examples: int = 30,
    gap: float = 1.5,
    seed: int = 0,
    levels: tuple[str, ...] = ("heads",),
) -> xr.Dataset:
    """Sites that recover 0, 1/4, 1/2, ... of a noisy gap."""
    rng = np.random.default_rng(seed)
    base = rng.normal(2.0, 1.0, n_examples)
    gaps = rng.normal(gap, 0.6, n_examples)
    shares = np.arange(n_sites) / 4
    patched = base[:, None] + gaps[:, None] * shares + rng.normal(0, 0.2, (n_examples, n_sites))
    return results.effects(
        patched,
        {"base": base, "source": base + gaps, "untouched": base - 0.4, "coasted": base - 0.2},
        {"example": [f"alias {i}" for i in range(n_examples)]},
        {
            "site": [f"site {i}" for i in range(n_sites)],
            "level": [levels[i % len(levels)] for i in range(n_sites)],
        },
        None,
        "logits",
        json.dumps({"seed": seed}),
    )


def brute_force_p(values: npt.NDArray[np.float64]) -> float:
    """The share of all 2ⁿ sign assignments whose |sum| is at least the one observed."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=values.size)))
    return float(np.mean(np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12)))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_mean_interval_is_scipys_one_sample_t_interval(confidence: float) -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, (3, 7, 5))
    found = statistics.mean_interval(values, axis=1, confidence=confidence)
    expected = scipy.stats.ttest_1samp(values, 0.0, axis=1).confidence_interval(confidence)
    np.testing.assert_allclose(found.estimate, values.mean(1), rtol=1e-13)
    np.testing.assert_allclose(found.low, expected.low, rtol=1e-12)
    np.testing.assert_allclose(found.high, expected.high, rtol=1e-12)


def test_mean_interval_leaves_out_nan_and_has_no_bounds_for_one_unit() -> None:
    values = np.array([[1.0, 2.0, np.nan, 4.0], [3.0, np.nan, np.nan, np.nan], [np.nan] * 4])
    found = statistics.mean_interval(values, axis=-1)
    alone = statistics.mean_interval(np.array([1.0, 2.0, 4.0]), axis=0)
    assert (found.estimate[0], found.low[0], found.high[0]) == tuple(map(float, alone))
    assert found.estimate[1] == 3.0
    assert np.isnan([found.low[1], found.high[1], found.estimate[2], found.low[2]]).all()


def test_mean_interval_of_identical_units_has_no_width_and_of_an_infinite_one_no_bounds() -> None:
    assert [float(x) for x in statistics.mean_interval(np.full(5, 0.25))] == [0.25, 0.25, 0.25]
    diverged = statistics.mean_interval(np.array([1.0, np.inf, 2.0]))
    assert diverged.estimate == np.inf
    assert np.isnan(diverged.low)


def test_confidence_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence is 95; expected"):
        statistics.mean_interval(np.arange(3.0), confidence=95)


def test_mean_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    values = np.random.default_rng(1).normal(0.7, 3.0, (4000, 8))
    found = statistics.mean_interval(values)
    assert 0.93 < np.mean((found.low <= 0.7) & (found.high >= 0.7)) < 0.97


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_sign_flip_p_equals_an_enumeration_of_all_signs(n: int) -> None:
    values = np.random.default_rng(n).normal(0.5, 1.0, (6, n))
    np.testing.assert_allclose(
        statistics.sign_flip_p(values), [brute_force_p(row) for row in values], rtol=1e-12
    )


def test_sign_flip_p_leaves_out_nan_and_is_one_where_all_units_are_zero() -> None:
    values = np.array([[1.0, 2.0, np.nan, 4.0, 5.0], [0.0] * 5, [np.nan] * 5, [0.0, 1.0, 2.0, 3.0, 4.0]])
    p = statistics.sign_flip_p(values)
    np.testing.assert_allclose(p[[0, 1, 3]], [2 / 16, 1.0, 2 / 16])
    assert np.isnan(p[2])
    assert p[3] == brute_force_p(values[3])


def test_identical_units_reach_the_smallest_p_and_opposite_ones_the_largest() -> None:
    np.testing.assert_allclose(statistics.sign_flip_p(np.full(8, 0.3)), 2 / 2**8)
    assert statistics.sign_flip_p(np.array([0.3, -0.3, 0.3, -0.3])) == 1.0


def test_an_infinite_unit_has_no_p() -> None:
    assert np.isnan(statistics.sign_flip_p(np.array([1.0, 2.0, np.inf])))


def test_sampled_p_is_near_the_exact_one_repeatable_and_never_zero() -> None:
    values = np.random.default_rng(2).normal(0.35, 1.0, (5, 16))
    p = statistics.sign_flip_p(values)
    exact = np.array([brute_force_p(row) for row in values])
    tolerance = 4 * np.sqrt(exact * (1 - exact) / 9999) + 2e-4
    assert (np.abs(p - exact) < tolerance).all()
    np.testing.assert_array_equal(p, statistics.sign_flip_p(values))
    assert statistics.sign_flip_p(np.ones(40)) == 2 / 10_000


@pytest.mark.slow
def test_a_sites_p_does_not_depend_on_the_sites_beside_it() -> None:
    values = np.random.default_rng(3).normal(0.2, 1.0, (20, 600))
    values[3:, 7] = np.nan
    together = statistics.sign_flip_p(values, axis=0)
    for i in (0, 7, 511, 512, 599):
        assert together[i] == statistics.sign_flip_p(values[:, i])


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 20])
def test_sign_flips_reject_a_true_null_no_more_often_than_five_in_a_hundred(n: int) -> None:
    values = np.random.default_rng(4).standard_t(3, (1000, n))  # symmetric, with heavy tails
    rejected = int((statistics.sign_flip_p(values) <= 0.05).sum())
    assert scipy.stats.binomtest(rejected, 1000, 0.05, alternative="greater").pvalue > 0.01
    assert rejected > 20  # and the test is not empty


def test_q_values_are_benjamini_and_hochbergs_by_hand() -> None:
    p = np.array([[0.01, 0.04, 0.03, 0.005, np.nan], [0.5, np.nan, np.nan, np.nan, np.nan]])
    # sorted .005 .01 .03 .04, times 4/rank: .02 .02 .04 .04; the smallest from each rank on
    by_hand = [[0.02, 0.04, 0.04, 0.02, np.nan], [0.5, np.nan, np.nan, np.nan, np.nan]]
    np.testing.assert_allclose(statistics.false_discovery_q(p), by_hand)


def test_recovery_is_the_ratio_of_means_and_not_the_mean_of_ratios() -> None:
    effect, gap = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.5, 3.5])
    found = statistics.recovery(effect, gap)
    assert found.estimate == 0.75
    assert found.estimate != np.mean(effect / gap)


def test_recoverys_bounds_are_where_a_t_test_of_effect_minus_r_gap_turns() -> None:
    rng = np.random.default_rng(5)
    gap = rng.normal(2.0, 1.0, 12)
    effect = 0.4 * gap + rng.normal(0, 0.5, 12)
    found = statistics.recovery(effect, gap)
    for bound in (float(found.low), float(found.high)):
        np.testing.assert_allclose(scipy.stats.ttest_1samp(effect - bound * gap, 0.0).pvalue, 0.05, rtol=1e-9)
    assert found.low < found.estimate < found.high


def test_recovery_exists_exactly_where_the_gaps_interval_excludes_zero() -> None:
    rng = np.random.default_rng(6)
    gap = rng.normal(0.5, 1.0, (500, 10))
    found = statistics.recovery(rng.normal(size=(500, 10)), gap)
    interval = scipy.stats.ttest_1samp(gap, 0.0, axis=1).confidence_interval()
    known = (interval.low > 0) | (interval.high < 0)
    assert 0 < known.sum() < 500
    for part in found:
        np.testing.assert_array_equal(np.isfinite(part), known)


def test_recovery_covers_the_true_ratio_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    gap = rng.normal(2.0, 1.0, (4000, 10))
    found = statistics.recovery(0.5 * gap + rng.normal(0, 0.5, gap.shape), gap)
    assert 0.93 < np.mean((found.low <= 0.5) & (found.high >= 0.5)) < 0.97


def test_recovery_of_base_and_source_is_zero_and_one_without_doubt() -> None:
    gap = np.array([1.0, 2.0, 1.5, 3.0])
    assert [float(x) for x in statistics.recovery(np.zeros(4), gap)] == [0.0, 0.0, 0.0]
    np.testing.assert_allclose([float(x) for x in statistics.recovery(gap, gap)], 1.0, rtol=1e-7)


def test_recovery_leaves_out_pairs_with_a_nan_and_needs_two() -> None:
    effect, gap = np.array([1.0, np.nan, 2.0, 9.0]), np.array([2.0, 2.0, 2.5, np.nan])
    np.testing.assert_allclose(
        list(statistics.recovery(effect, gap, confidence=0.5)),
        list(statistics.recovery([1, 2], [2, 2.5], confidence=0.5)),
    )
    assert np.isnan(statistics.recovery([1.0], [2.0]).estimate)


def test_pairwise_recovery_is_each_pairs_own_ratio_under_its_own_name() -> None:
    dataset = build()
    dataset["source"][3] = dataset["base"][3]
    ratio = statistics.pairwise_recovery(dataset)
    assert ratio.name == "pairwise_recovery"
    gap = float(dataset["source"][5] - dataset["base"][5])
    np.testing.assert_allclose(ratio.values[5], dataset["effect"].values[5] / gap)
    assert np.isnan(ratio.values[3]).all()


def test_a_summary_holds_for_each_site_what_the_functions_give_for_it_alone() -> None:
    dataset = build()
    summary = statistics.summarize(dataset)
    gap = (dataset["source"] - dataset["base"]).values
    for i in range(4):
        effect, site = dataset["effect"].values[:, i], summary.isel(site=i)
        for name, interval in (
            ("effect", statistics.mean_interval(effect)),
            ("recovery", statistics.recovery(effect, gap)),
            ("gap", statistics.mean_interval(gap)),
        ):
            found = [site[key].item() for key in (name, f"{name}_low", f"{name}_high")]
            np.testing.assert_allclose(found, [float(part) for part in interval])
        assert site["p"] == statistics.sign_flip_p(effect)
    np.testing.assert_allclose(summary["q"], scipy.stats.false_discovery_control(summary["p"].values))
    np.testing.assert_allclose(summary["coasted"], summary["base"] - 0.2)
    np.testing.assert_allclose(summary["untouched"], dataset["untouched"].mean())
    assert summary["n"].values.tolist() == [30] * 4
    assert summary["n"].dtype == np.int64
    assert summary.attrs["unit"] == "example, in this run"
    assert summary["effect_low"].attrs["units"] == summary["gap"].attrs["units"] == "logits"
    assert summary["recovery"].attrs["units"] == "1"
    assert summary["level"].dims == ("site",)
    assert summary.attrs["provenance"] == dataset.attrs["provenance"]


def test_q_is_counted_within_a_level_and_within_each_other_dim() -> None:
    parts = [build(n_sites=6, gap=0.3, seed=i, levels=("heads", "layers")) for i in range(2)]
    summary = statistics.summarize(results.concat(parts, "step", [0, 50]))
    for step, start in itertools.product((0, 50), (0, 1)):
        one = summary.sel(step=step).isel(site=slice(start, None, 2))
        assert len(set(one["level"].values)) == 1
        np.testing.assert_allclose(one["q"], scipy.stats.false_discovery_control(one["p"].values))


def test_each_measure_step_and_optimizer_is_summarised_as_if_alone() -> None:
    steps = [results.concat([build(seed=i + 2 * j) for i in range(2)], "step", [0, 50]) for j in range(2)]
    summary = statistics.summarize(results.concat(steps, "optimizer", ["stored", "fresh"]))
    assert set(summary["gap"].dims) == {"optimizer", "step"}
    alone = statistics.summarize(build(seed=1 + 2 * 1))
    xr.testing.assert_allclose(
        summary.sel(step=50, optimizer="fresh").drop_vars(["step", "optimizer"]), alone
    )


def test_with_a_dim_seed_the_unit_is_the_run() -> None:
    runs = [build(seed=i) for i in range(7)]
    dataset = results.concat(runs, "seed", list(range(7)))
    summary = statistics.summarize(dataset)
    means = np.stack([run["effect"].values.mean(0) for run in runs])
    expected = scipy.stats.ttest_1samp(means, 0.0, axis=0).confidence_interval()
    np.testing.assert_allclose(summary["effect_low"], expected.low)
    np.testing.assert_allclose(summary["p"], [brute_force_p(column) for column in means.T])
    assert summary["n"].values.tolist() == [7] * 4
    assert summary.attrs["unit"] == "run"
    averaged = results.concat([run.mean("example", keep_attrs=True) for run in runs], "seed", list(range(7)))
    xr.testing.assert_allclose(statistics.summarize(averaged), summary)


def test_no_recovery_is_shown_where_the_gap_may_be_zero() -> None:
    summary = statistics.summarize(build(gap=0.0))
    assert summary["gap_low"] < 0 < summary["gap_high"]
    for name in ("recovery", "recovery_low", "recovery_high"):
        assert np.isnan(summary[name]).all()
    assert np.isfinite(summary["effect"]).all()


def test_a_summary_survives_its_file(tmp_path: object) -> None:
    summary = statistics.summarize(build())
    path = f"{tmp_path}/summary.h5"
    results.save(summary, path)
    xr.testing.assert_identical(results.load(path), summary)


def test_what_cannot_be_summarised_is_refused_with_what_was_found() -> None:
    with pytest.raises(ValueError, match="expected \\['effect'\\] too"):
        statistics.summarize(build().drop_vars("effect"))
    with pytest.raises(ValueError, match=r"expected \['source'\] too"):
        statistics.summarize(build().drop_vars("source"))
    with pytest.raises(ValueError, match="no dim 'example'; expected one of \\['site'\\]"):
        statistics.summarize(build().isel(example=0))


@pytest.mark.slow
def test_a_hundred_sites_over_all_dims_take_seconds() -> None:
    rng = np.random.default_rng(0)
    dims = {"optimizer": 2, "step": 2, "measure": 3, "example": 30}
    values = {name: (tuple(dims), rng.normal(size=tuple(dims.values()))) for name in ("base", "source")}
    effect = ((*dims, "site"), rng.normal(size=(*dims.values(), 100)))
    start = time.perf_counter()
    summary = statistics.summarize(xr.Dataset({**values, "effect": effect}))
    assert time.perf_counter() - start < 10
    assert summary["p"].shape == (2, 2, 3, 100)


def test_the_table_ranks_sites_by_recovery_under_the_gap_and_n() -> None:
    summary = statistics.summarize(build())
    lines = statistics.table(summary).splitlines()
    assert lines[0].startswith(f"gap {summary['gap'].item():.3g} [")
    assert "logits, n = 30 (unit: example, in this run)" in lines[0]
    assert lines[1].split() == ["site", "effect", "recovery", "p", "q"]
    assert [line[:6] for line in lines[2:]] == ["site 3", "site 2", "site 1", "site 0"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert len(statistics.table(summary, n=2).splitlines()) == 4


def test_the_table_ranks_by_size_of_effect_where_there_is_no_recovery() -> None:
    summary = statistics.summarize(build(gap=0.0))
    order = np.argsort(-np.abs(summary["effect"].values))
    lines = statistics.table(summary).splitlines()[2:]
    assert [line[:6] for line in lines] == [f"site {i}" for i in order]
    assert all(" - " in line for line in lines)


def test_the_table_gives_up_its_bars_for_whole_labels_whatever_the_labels_and_numbers() -> None:
    dataset = build() * -1.2345e-7
    dataset["site"] = [
        f"blocks.{i}.attn.hook_result.with.a.very.long.name.that.never.seems.to.end" for i in range(4)
    ]
    lines = statistics.table(statistics.summarize(dataset)).splitlines()
    assert {line.split()[0] for line in lines[2:]} == set(dataset["site"].values)
    assert not any("…" in line or "█" in line for line in lines)


def test_the_table_wants_one_step_and_says_how_to_select_it() -> None:
    summary = statistics.summarize(results.concat([build(), build(seed=1)], "step", [0, 50]))
    with pytest.raises(ValueError, match=r"summary.sel\(step=...\)"):
        statistics.table(summary)
    assert statistics.table(summary.sel(step=[0])) == statistics.table(statistics.summarize(build()))


def test_the_tables_bars_are_as_long_as_the_recoveries_or_else_the_effects() -> None:
    summary = statistics.summarize(build())
    lines = statistics.table(summary).splitlines()[2:]
    shares = summary["recovery"].values
    for line in lines:
        share = abs(shares[int(line.split()[1])])
        assert line.count("█") == round(10 * share / abs(shares).max())
    without = statistics.summarize(build(gap=0.0))
    sizes = np.abs(without["effect"].values)
    for line in statistics.table(without).splitlines()[2:]:
        assert line.count("█") == round(10 * sizes[int(line.split()[1])] / sizes.max())
    alike = without.assign(effect=0 * without["effect"], recovery=np.nan * without["effect"])
    assert "█" not in statistics.table(alike)


# --- heads and ranks --------------------------------------------------------------------------------------


def by_head(variable: str = "effect") -> xr.Dataset:
    """Means 0.3, −0.9, 0.5 and, of the whole layer, 2."""
    values = np.array([0.3, -0.9, 0.5, 2.0]) + np.array([[-0.1], [0.1]])
    layer, head = [0, 0, 1, 1], [0, 1, 1, -1]
    coords = {
        "site": [f"L{i}H{j}" for i, j in zip(layer, head, strict=True)],
        "layer": ("site", layer),
        "head": ("site", head),
        "component": ("site", ["z"] * 4),
    }
    return xr.Dataset({variable: (("example", "site"), values)}, coords)


@pytest.mark.parametrize("variable", ["effect", "attribution"])
def test_top_heads_are_those_with_the_largest_mean_whatever_its_sign(variable: str) -> None:
    assert statistics.top_heads(by_head(variable)) == [(0, 1), (1, 1), (0, 0)]
    assert statistics.top_heads(by_head(variable), k=1) == [(0, 1)]
    assert statistics.top_heads(by_head(variable).mean("example"), k=2) == [(0, 1), (1, 1)]


def test_top_heads_want_one_site_for_each_head_and_one_measure() -> None:
    twice = by_head()
    twice["head"] = ("site", [0, 0, 1, -1])
    with pytest.raises(ValueError, match="3 sites for 2 heads; select one each"):
        statistics.top_heads(twice)
    with pytest.raises(ValueError, match="select one value of each but 'site'"):
        statistics.top_heads(xr.concat([by_head(), by_head()], "measure"))


def test_the_rank_correlation_is_scipys_over_sites() -> None:
    one, noise = build(n_sites=9), np.random.default_rng(1).normal(0, 0.5, (30, 9))
    other = one.assign(attribution=(one["effect"] + noise).round(1)).drop_vars("effect")  # with ties
    found = statistics.rank_correlation(other, one)
    expected = [
        scipy.stats.spearmanr(a, b).statistic
        for a, b in zip(other["attribution"].values, one["effect"].values, strict=True)
    ]
    np.testing.assert_allclose(found["per_example"], expected, rtol=1e-12)
    means = other["attribution"].values.mean(0), one["effect"].values.mean(0)
    assert found["of_means"].item() == pytest.approx(scipy.stats.spearmanr(*means).statistic)


def test_the_rank_correlation_of_other_sites_or_examples_is_refused() -> None:
    for other in (build().isel(site=[1, 0, 2, 3]), build(n_examples=29)):
        with pytest.raises(ValueError, match="different sites or examples"):
            statistics.rank_correlation(build(), other)


def test_one_example_has_a_ratio_and_no_interval() -> None:
    one = build().isel(example=[0])
    summary = statistics.summarize(one)
    ratio = one["effect"].isel(example=0) / (one["source"] - one["base"]).isel(example=0)
    np.testing.assert_allclose(summary["recovery"], ratio)
    assert np.isnan(summary["recovery_low"]).all()
    assert "n = 1 (unit: example, in this run): no intervals\n" in statistics.table(summary)


def test_sites_that_hold_each_other_keep_their_order_in_a_table() -> None:
    summary = statistics.summarize(build())
    labels = summary["site"].values.tolist()
    nested = summary.assign_coords(level=("site", ["up_to_layer"] * len(labels)))
    shown = [line.split("  ")[0].strip() for line in statistics.table(nested).splitlines()[2:]]
    assert shown == labels
    by_size = [line.split("  ")[0].strip() for line in statistics.table(summary).splitlines()[2:]]
    assert by_size != labels


def test_results_say_what_no_layer_is() -> None:
    assert "-1" in build()["layer"].attrs["long_name"]
