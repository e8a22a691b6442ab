"""Intervals and tests on simulated runs of which the truth is known: how often they are right.

Runs share an effect of their own, aliases scatter about their run's: x = truth + run + alias. Every share is of
4,000 replications unless it says otherwise: its binomial standard error is √(.95 · .05 / 4000) = .0034, so the band
of .93 to .97 is ± 5.8 of them wide. Replications stand along `site`, so that the summary itself is what is tested.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
import xarray as xr

from dynamics import results, statistics

pytestmark = pytest.mark.slow

Array = npt.NDArray[np.float64]

N = 4000
TRUTH, SHARE = 0.7, 0.4
"""The mean effect, and in the simulations of recovery the part of the gap that it is."""


def simulated(
    n_runs: int, n_aliases: int, n: int = N, truth: float = TRUTH, of_runs: float = 1.0, seed: int = 0
) -> Array:
    """[run, alias, replication]: a truth, an effect of each run, and the aliases' scatter of 1 about it."""
    rng = np.random.default_rng([seed, n_runs, n_aliases])
    return truth + of_runs * rng.normal(size=(n_runs, 1, n)) + rng.normal(size=(n_runs, n_aliases, n))


def labelled(effect: Array, gap: Array | None = None) -> xr.Dataset:
    """Effects [(run,) alias, replication] as a verb would return them; source − base is `gap`."""
    dims = ("seed", "example", "site")[-effect.ndim :]
    base = np.zeros(effect.shape[:-1])
    source = base + 1 if gap is None else gap
    return xr.Dataset({"effect": (dims, effect), "base": (dims[:-1], base), "source": (dims[:-1], source)})


def share(covered: npt.ArrayLike) -> float:
    return float(np.mean(np.asarray(covered)))


def covers(found: xr.Dataset, name: str, truth: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    return (found[f"{name}_low"].values <= truth) & (truth <= found[f"{name}_high"].values)


def effects_of(effect: Array) -> xr.Dataset:
    """The summary's intervals of the effect alone."""
    low_high = statistics.mean_interval(effect, axis=0)
    return xr.Dataset(
        {f"effect_{n}": ("site", b) for n, b in zip(("low", "high"), low_high[1:], strict=True)}
    )


def test_the_band_is_many_binomial_errors_wide():
    error = np.sqrt(0.95 * 0.05 / N)
    assert 0.02 / error > 5


# --- intervals over aliases -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_aliases", [5, 10, 30])
def test_within_a_run_the_interval_over_aliases_covers_the_runs_own_effect(n_aliases):
    rng = np.random.default_rng(n_aliases)
    own = TRUTH + rng.normal(size=N)
    effect = own + rng.normal(size=(n_aliases, N))
    assert 0.93 < share(covers(effects_of(effect), "effect", own)) < 0.97


def test_the_interval_over_one_runs_aliases_does_not_cover_the_effect_over_runs():
    effect = simulated(1, 30)[0]
    assert share(covers(effects_of(effect), "effect", TRUTH)) < 0.5


# --- intervals over runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("of_runs", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("n_runs", [5, 12])
def test_the_interval_over_runs_covers_the_truth_however_much_runs_differ(n_runs, of_runs):
    effect = simulated(n_runs, 6, of_runs=of_runs)
    assert 0.93 < share(covers(effects_of(effect.mean(1)), "effect", TRUTH)) < 0.97


@pytest.mark.parametrize("n_runs", [5, 12])
def test_a_summary_with_a_dim_seed_covers_the_truth_of_which_runs_are_a_sample(n_runs):
    effect = simulated(n_runs, 6)
    summary = statistics.summarize(labelled(effect))
    assert summary.attrs["unit"] == "run"
    assert set(summary["n"].values) == {n_runs}
    assert 0.93 < share(covers(summary, "effect", TRUTH)) < 0.97
    np.testing.assert_allclose(summary["effect_low"], effects_of(effect.mean(1))["effect_low"])


@pytest.mark.parametrize("n_runs", [5, 12])
def test_aliases_of_several_runs_thrown_together_cover_far_too_seldom(n_runs):
    effect = simulated(n_runs, 10)
    assert share(covers(effects_of(effect.reshape(-1, N)), "effect", TRUTH)) < 0.7
    assert share(covers(effects_of(effect.mean(1)), "effect", TRUTH)) > 0.93


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.99])
def test_other_confidences_are_kept_over_runs_as_well(confidence):
    summary = statistics.summarize(labelled(simulated(5, 4)), confidence=confidence)
    error = np.sqrt(confidence * (1 - confidence) / N)
    assert abs(share(covers(summary, "effect", TRUTH)) - confidence) < 4 * error


def test_runs_that_lack_aliases_do_not_spoil_the_coverage():
    """A third of the aliases are missing: a run's mean is over those it has."""
    effect = simulated(5, 6)
    effect[:, 4:] = np.where(np.random.default_rng(0).random((5, 2, N)) < 0.9, np.nan, effect[:, 4:])
    assert 0.93 < share(covers(statistics.summarize(labelled(effect)), "effect", TRUTH)) < 0.97


# --- recovery ---------------------------------------------------------------------------------------------


def recovered(n_runs: int, n_aliases: int, n: int = N) -> tuple[Array, Array]:
    """Effects and gaps [run, alias, replication] that share their accidents; the ratio of their means is SHARE."""
    gap = simulated(n_runs, n_aliases, n, truth=3.0, of_runs=0.5, seed=1)
    own = simulated(n_runs, n_aliases, n, truth=0.0, of_runs=0.4, seed=2)
    return SHARE * gap + own, gap


@pytest.mark.parametrize("n_aliases", [10, 30])
def test_within_a_run_fiellers_interval_covers_the_runs_ratio_of_means(n_aliases):
    rng = np.random.default_rng(n_aliases)
    gaps, effects = 3 + 0.5 * rng.normal(size=N), 1.2 + 0.4 * rng.normal(size=N)
    gap = gaps + rng.normal(size=(n_aliases, N))
    effect = effects + 0.5 * (gap - gaps) + rng.normal(size=(n_aliases, N))
    found = statistics.recovery(effect, gap, axis=0)
    known = np.isfinite(found.estimate)
    assert share(known) > 0.97  # the few without one are no part of the claim
    truth = (effects / gaps)[known]
    assert 0.93 < share((found.low[known] <= truth) & (truth <= found.high[known])) < 0.97


@pytest.mark.parametrize("n_runs", [5, 12])
def test_over_runs_fiellers_interval_covers_the_ratio_of_means(n_runs):
    effect, gap = recovered(n_runs, 6)
    found = statistics.recovery(effect.mean(1), gap.mean(1), axis=0)
    known = np.isfinite(found.estimate)
    assert share(known) > 0.97
    assert 0.93 < share((found.low[known] <= SHARE) & (found.high[known] >= SHARE)) < 0.97


def test_the_summary_of_runs_gives_the_recovery_of_their_means():
    effect, gap = recovered(5, 6, n=7)
    for i in range(7):
        one = statistics.summarize(labelled(effect[..., i : i + 1], gap[..., i]))
        expected = statistics.recovery(effect[..., i].mean(1), gap[..., i].mean(1))
        found = [one[name].item() for name in ("recovery", "recovery_low", "recovery_high")]
        np.testing.assert_allclose(found, [float(part) for part in expected])


def test_fiellers_interval_over_the_aliases_of_several_runs_covers_too_seldom():
    effect, gap = recovered(5, 30)
    found = statistics.recovery(effect.reshape(-1, N), gap.reshape(-1, N), axis=0)
    assert share((found.low <= SHARE) & (found.high >= SHARE)) < 0.8


# --- sign flips -------------------------------------------------------------------------------------------


def rejected(p: Array) -> int:
    return int((p <= 0.05).sum())


def no_more_than_one_in_twenty(n_rejected: int, n: int) -> bool:
    """Whether a share of 5 % is not contradicted (one-sided binomial test at 1 %)."""
    return bool(scipy.stats.binomtest(n_rejected, n, 0.05, alternative="greater").pvalue > 0.01)


@pytest.mark.parametrize("of_runs", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("n_runs", [6, 12])
def test_sign_flips_over_runs_reject_no_more_than_one_in_twenty_true_nulls(n_runs, of_runs):
    n = N if n_runs == 6 else 1500  # all 4096 assignments for each of them
    effect = simulated(n_runs, 4, n, truth=0.0, of_runs=of_runs)
    p = statistics.summarize(labelled(effect))["p"].values
    assert no_more_than_one_in_twenty(rejected(p), n)
    assert rejected(p) > 0.02 * n  # six runs can reach p = 2/64, twelve 2/4096


def test_sign_flips_over_aliases_reject_a_true_null_of_runs_far_too_often():
    """Which is why runs are the unit: 300 replications of 6 runs of 10 aliases."""
    effect = simulated(6, 10, 300, truth=0.0)
    by_alias = statistics.sign_flip_p(effect.reshape(-1, 300), axis=0)
    by_run = statistics.sign_flip_p(effect.mean(1), axis=0)
    assert rejected(by_alias) > 0.23 * 300
    assert not no_more_than_one_in_twenty(rejected(by_alias), 300)
    assert no_more_than_one_in_twenty(rejected(by_run), 300)


def test_sign_flips_over_aliases_are_sound_for_the_claim_about_one_run():
    effect = np.random.default_rng(0).normal(size=(10, 2000))  # this run's own effect is zero
    p = statistics.sign_flip_p(effect, axis=0)
    assert no_more_than_one_in_twenty(rejected(p), 2000)
    assert rejected(p) > 0.03 * 2000


def test_five_runs_never_reach_one_in_twenty_and_six_do_where_all_agree():
    for n_runs, smallest in ((5, 2 / 32), (6, 2 / 64)):
        p = statistics.summarize(labelled(simulated(n_runs, 3, 200, truth=50.0)))["p"].values
        np.testing.assert_allclose(p, smallest)


def test_sign_flips_over_runs_find_an_effect_that_is_there():
    effect = simulated(12, 4, 500, truth=1.5)
    assert rejected(statistics.summarize(labelled(effect))["p"].values) > 0.9 * 500


# --- false discoveries ------------------------------------------------------------------------------------


def test_of_what_has_a_small_q_one_in_ten_is_false_at_most_on_average():
    """Sites of 300 replications: 15 with an effect, 25 without; discoveries at q ≤ .1."""
    there = np.arange(40) < 15
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(10, 300 * 40)) + np.tile(np.where(there, 1.2, 0.0), 300)
    p = statistics.sign_flip_p(effect, axis=0).reshape(300, 40)
    found = statistics.false_discovery_q(p) <= 0.1
    false = (found & ~there).sum(1) / np.maximum(found.sum(1), 1)
    assert false.mean() < 0.1 + 3 * false.std() / np.sqrt(300)
    assert found[:, there].mean() > 0.5


# --- placebos ---------------------------------------------------------------------------------------------


def beside_placebos(n: int, n_placebos: int) -> tuple[Array, Array]:
    """|effect| and the summary's placebo, [n]: sites that are no other than the placebos beside them."""
    rng = np.random.default_rng(n_placebos)
    effect = rng.normal(size=(2, n, 1 + n_placebos))
    labels = [[f"{i}", *(f"placebo {k} of {i}" for k in range(n_placebos))] for i in range(n)]
    dataset = results.effects(
        effect.reshape(2, -1),
        {"base": np.zeros(2), "source": np.ones(2)},
        {"example": ["a", "b"]},
        {
            "site": [label for row in labels for label in row],
            "level": (["heads"] + ["placebo"] * n_placebos) * n,
            "component": [f"{i}" for i in range(n) for _ in range(1 + n_placebos)],
        },
        None,
        "logit",
        "{}",
    )
    summary = statistics.summarize(dataset)
    return np.abs(summary["effect"].values), summary["placebo"].values


def test_of_a_hundred_placebos_the_quantile_is_exceeded_by_one_placebo_in_twenty():
    size, placebo = beside_placebos(400, 99)
    exceeding = int((size > placebo).sum())
    assert no_more_than_one_in_twenty(exceeding, 400)
    assert exceeding > 0.02 * 400


def test_of_twenty_placebos_the_quantile_is_exceeded_by_one_placebo_in_twenty():
    size, placebo = beside_placebos(600, 20)
    assert no_more_than_one_in_twenty(int((size > placebo).sum()), 600)
