"""The ten checks: what they ask, what they conclude, of which sites and states."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics import measures, results, statistics, steps
from dynamics.config import ConfigError
from dynamics.sites import LEVELS, SiteError
from dynamics.studies import Check, checks, ten_checks
from tests.zoo.checked_runs import (
    IMPULSE,
    INTERVAL,
    N_ALIASES,
    N_INTERVALS,
    NAMES,
    STEP,
    WEAK,
    made,
)


def test_checks_are_kept_as_a_dataset_that_says_what_was_asked(tmp_path):
    made = [Check("one", "+1.0 logit", "holds"), Check("two", "not made", "-")]
    results.save(checks.as_dataset(made, "attn 0", "X2 step 3"), tmp_path / "checks.h5")
    found = results.load(tmp_path / "checks.h5")
    assert found["check"].values.tolist() == ["one", "two"]
    assert found["verdict"].sel(check="two").item() == "-"
    assert found["figure"].values.tolist() == ["+1.0 logit", "not made"]
    assert (found.attrs["site"], found.attrs["at"]) == ("attn 0", "X2 step 3")


@pytest.mark.slow
def test_there_are_ten_checks_in_their_order(batteries):
    for found in batteries.values():
        assert all(isinstance(check, Check) for check, _ in found)
        assert [check.name for check, _ in found] == NAMES


@pytest.mark.slow
def test_verdicts_are_those_that_are_allowed_and_the_last_two_are_the_readers(batteries):
    for found in batteries.values():
        verdicts = [check.verdict for check, _ in found]
        assert set(verdicts[:8]) <= {"holds", "fails", "open"}
        assert verdicts[8:] == ["-", "-"]
        assert set(verdicts) <= set(get_args(checks.Verdict))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["seed 0", "both"])
def test_figures_show_the_means_with_their_intervals(batteries, which):
    for (check, values), n in zip(batteries[which], N_INTERVALS, strict=True):
        shown = INTERVAL.findall(check.figure)
        assert len(shown) == n
        expected = [
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*map(float, statistics.mean_interval(v))) for v in values
        ]
        assert shown == expected


@pytest.mark.slow
def test_of_one_run_the_aliases_are_the_units(batteries):
    for i, (_, values) in enumerate(batteries["seed 0"]):
        assert {len(v) for v in values} <= {N_ALIASES // 2 if i == 4 else N_ALIASES}


@pytest.mark.slow
def test_of_several_runs_each_is_one_unit_the_mean_over_its_aliases(batteries):
    for (_, zero), (_, one), (_, both) in zip(*batteries.values(), strict=True):
        for mine, yours, together in zip(zero, one, both, strict=True):
            # what is turned by a sign takes that of all units together, which single runs need not share
            one_each = [abs(mine.mean()), abs(yours.mean())]
            np.testing.assert_allclose(np.abs(together), one_each, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_the_battery_is_made_one_check_at_a_time(runs, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a later check")

    monkeypatch.setattr(checks, "patch_window", refused)
    monkeypatch.setattr(checks, "patch_updates", refused)
    assert next(ten_checks(runs[:1], "embed", STEP, impulse=IMPULSE)).name == NAMES[0]


@pytest.mark.slow
def test_the_battery_moves_no_generator_and_changes_no_run(runs, batteries):
    before, state = [t.verify() for t in runs], torch.get_rng_state()
    for _ in zip(ten_checks(runs[:1], "L0H0", STEP, impulse=IMPULSE), range(2), strict=False):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    assert [t.verify() for t in runs] == before == [[], []]


@pytest.mark.slow
def test_the_same_battery_twice_says_the_same(runs, batteries):
    again = [c for c, _ in zip(ten_checks(runs[:1], "embed", STEP, impulse=IMPULSE), range(1), strict=False)]
    assert again == [check for check, _ in batteries["seed 0"][:1]]


UP, DOWN, WIDE = np.array([1.0, 1.1, 0.9]), np.array([-1.0, -1.1, -0.9]), np.array([1.0, -1.0, 0.5])
ONE, NONE, ZERO, ALIKE = np.array([5.0]), np.full(3, np.nan), np.zeros(4), np.full(4, 0.2)


@pytest.mark.parametrize(
    ("groups", "verdict"),
    [
        ((UP,), "holds"),
        ((DOWN,), "holds"),
        ((UP, UP), "holds"),
        ((DOWN, DOWN, DOWN), "holds"),
        ((UP, DOWN), "fails"),
        ((DOWN, UP), "fails"),
        ((UP, UP, DOWN), "fails"),
        ((UP, WIDE), "open"),
        ((WIDE, DOWN), "open"),
        ((UP, DOWN, WIDE), "open"),
        ((UP, ONE), "open"),
        ((NONE, UP), "open"),
        ((ZERO,), "open"),
        ((ALIKE, UP), "holds"),
        ((ALIKE, DOWN), "fails"),
    ],
)
def test_signs_agree_disagree_or_are_not_known(groups, verdict):
    assert checks._signs(*groups) == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (UP, "holds"),
        (DOWN, "fails"),
        (WIDE, "open"),
        (ONE, "open"),
        (-ONE, "open"),
        (NONE, "open"),
        (ZERO, "open"),
        (ALIKE, "holds"),
        (-ALIKE, "fails"),
    ],
)
def test_a_mean_is_above_zero_below_or_not_known(values, verdict):
    assert checks._above(values) == verdict


def test_an_interval_that_just_includes_zero_is_open():
    values = np.random.default_rng(0).normal(size=12)
    _, low, high = statistics.mean_interval(values)
    for shift, signs, above in ((-low * 1.001, "holds", "holds"), (-low * 0.999, "open", "open")):
        assert (checks._signs(values + shift), checks._above(values + shift)) == (signs, above)
    assert checks._above(values - high * 1.001) == "fails"
    assert checks._signs(values - high * 1.001) == "holds"


def test_values_of_one_run_are_its_aliases_and_of_several_their_means():
    parts = {"a": np.array([1.0, 2.0]), "b": np.array([4.0, 6.0, 8.0])}
    assert checks._gathered(["a"], parts.get).tolist() == [1.0, 2.0]
    assert checks._gathered(["a", "b"], parts.get).tolist() == [1.5, 6.0]


OF_LEVEL = {
    "layers": "block 1",
    "components": "mlp 0",
    "heads": "L0H1",
    "circuits": "OV L1H0",
    "matrices": "W_V L0H1",
    "up_to_layer": "+ block 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_site_of_any_level_is_found_by_its_label(runs, level, texts):
    run = made(runs[0], OF_LEVEL[level])
    expected = next(s for s in LEVELS[level](run.recipe.model) if s.label == OF_LEVEL[level])
    assert run.site.covers.keys() == expected.covers.keys()
    assert run.site.coords == expected.coords
    check = next(ten_checks(runs[:1], OF_LEVEL[level], STEP, impulse=IMPULSE))
    assert check.name == NAMES[0]
    found = dy.patch_gradients(
        run.recipe, run.state, run.task.contrasts(), [expected], measures.correct_logit
    )
    np.testing.assert_allclose(texts.calls[0][0], found["effect"].values[:, 0], rtol=WEAK, atol=WEAK)
    assert np.abs(texts.calls[0][0]).max() > 1e-6


def test_an_unknown_site_is_refused_and_every_label_of_every_level_is_listed(runs):
    run = made(runs[0])
    with pytest.raises(SiteError, match=r"no site 'attn 7'; there are block 0, ") as error:
        next(ten_checks(runs[:1], "attn 7", STEP, impulse=IMPULSE))
    said, _, meant = str(error.value).partition(". Did you mean ")
    assert meant in ("'attn 0'?", "'attn 1'?")
    listed = said.partition("there are ")[2].split(", ")
    labels = [s.label for level in LEVELS.values() for s in level(run.recipe.model)]
    assert listed == [part for label in labels for part in label.split(", ")]
    assert len(set(labels)) == len(labels) > 40


@pytest.mark.parametrize("x2_step", [0, STEP])
def test_the_step_is_counted_from_x2s_start_and_reached_by_replay(runs, x2_step):
    run = made(runs[0], x2_step=x2_step)
    start = run.task.config.phases.starts["x2"]
    assert run.stored.step == start + x2_step
    replayed = runs[0].at(start)
    for step in range(start, start + x2_step):
        replayed = steps.replay(run.recipe, replayed, run.task.batch(step))
    for name, p in replayed.parameters.items():
        assert torch.equal(p, run.stored.parameters[name])


@pytest.mark.slow
def test_fresh_is_a_new_optimizer_at_the_same_parameters_and_stored_the_runs_own(runs, texts):
    fresh, stored = (made(runs[0], optimizer=which) for which in ("fresh", "stored"))
    assert not any(fresh.state.optimizer.state.values())
    assert stored.state.optimizer.state["embed.W_E"]["exp_avg_sq"].any()
    assert all(torch.equal(p, stored.state.parameters[n]) for n, p in fresh.state.parameters.items())
    for which in (fresh, stored):
        checks._directions([which])
    assert not np.allclose(texts.calls[0][0], texts.calls[2][0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "frehs"}, "found optimizer='frehs'; expected fresh or stored"),
        ({"x2_step": -1}, "found x2_step=-1"),
        ({"x2_step": 20}, "found x2_step=20 .* below its 20 steps"),
        ({"impulse": 0}, "found x2_step=4 and impulse=0"),
        ({"impulse": 16}, "found x2_step=4 and impulse=16"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused_before_anything_is_computed(
    runs, settings, said, monkeypatch
):
    for verb in ("both_directions", "patch_gradients", "patch_updates", "patch_window"):
        monkeypatch.setattr(checks, verb, None)
    with pytest.raises(ConfigError, match=said):
        next(ten_checks(runs[:1], **{"site": "embed", "x2_step": STEP, "impulse": IMPULSE, **settings}))


@pytest.mark.slow
def test_the_longest_impulse_ends_with_the_run(runs):
    assert checks._impulse([made(runs[0], impulse=15)]).verdict in ("holds", "fails", "open")
    assert next(ten_checks(runs[:1], "L0H0", STEP, impulse=15)).name == NAMES[0]
