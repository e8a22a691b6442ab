"""The null control: what is called where nothing is, and what is where something is."""

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics import results
from scripts.experiments import null_control
from tests.scripts.calling import call, in_small, rows_of

RUNS, SITES = 24, 12


def _effects(draws, shift=0.0):
    """Of runs whose sites move together, three ways."""
    together = draws.standard_normal((RUNS, 3)) @ draws.standard_normal((3, SITES))
    return together + draws.standard_normal((RUNS, SITES)) + shift


def test_p_as_found_is_that_of_sign_flips_over_runs():
    """Exactly, over all 4096 assignments of twelve signs; and within four standard errors of 5000 of them."""
    effects = _effects(np.random.default_rng(0), 0.3)[:12]
    exact = dy.statistics.sign_flip_p(effects, axis=0)
    assert null_control.exchanged_p(effects)[0] == pytest.approx(exact, abs=0.03)


def test_an_effect_that_all_runs_share_is_called_until_runs_tags_are_exchanged():
    draws = np.random.default_rng(1)
    effects = 1 + 0.5 * draws.standard_normal((RUNS, SITES))
    turned = effects * draws.choice([-1, 1], (RUNS, 1))
    with in_small(null_control, N_EXCHANGES=499, N_HALVES=10):
        assert null_control.family_p(effects) < 0.01
        assert null_control.share_in_halves(effects)[0] > 0.9
        assert null_control.family_p(turned) > 0.05
        assert null_control.share_in_halves(turned)[0] < 0.5


@pytest.mark.slow
def test_the_share_and_the_familys_p_cover_where_tags_say_nothing_and_sites_move_together():
    draws, covered, families = np.random.default_rng(2), [], []
    with in_small(null_control, N_EXCHANGES=499, N_HALVES=10):
        for _ in range(100):
            effects = _effects(draws)
            _, low, high = null_control.share_in_halves(effects)
            covered.append(low <= 0.05 <= high)
            families.append(null_control.family_p(effects))
    assert np.mean(covered) >= 0.9
    assert np.mean(np.array(families) <= 0.05) <= 0.12  # .05, and 3 standard errors of 100 draws
    assert 0.3 < np.mean(np.array(families) <= 0.5) < 0.7


def test_levels_and_states_are_counted_apart():
    effect = np.zeros((RUNS, 2, 3))
    effect[:, 1, 0] = 1.0
    effect += 1e-3 * np.random.default_rng(3).standard_normal(effect.shape)
    found = xr.DataArray(
        effect,
        {"optimizer": ["fresh", "stored"], "level": ("site", ["components", "heads", "heads"])},
        ("seed", "optimizer", "site"),
    )
    with in_small(null_control, N_EXCHANGES=499, N_HALVES=10):
        rows = {(row[0], row[1]): row for row in rows_of("\n".join(null_control.table(found)))[2:]}
    assert rows["components", "stored"][2] == "1 of 1"
    assert rows["components", "stored"][3].startswith("1.000 [1.000, 1.000]")
    assert rows["components", "fresh"][2][-4:] == "of 1"
    assert rows["all", "both"][2].endswith("of 6")


def test_where_both_directions_bring_alike_only_one_of_them_calls_a_site(tmp_path):
    """Every site brings 1 ± .1 in either direction, and 0 ± .1 beyond that."""
    draws = np.random.default_rng(4)
    dims, coords = ("direction", "optimizer", "site"), {"direction": ["sufficiency", "necessity"]}
    coords |= {
        "optimizer": ["fresh", "stored"],
        "site": list("ab"),
        "level": ("site", ["components", "heads"]),
    }
    for seed in null_control.SEEDS:
        base, effect = draws.standard_normal((2, 2, 1)), 1 + 0.1 * draws.standard_normal((2, 2, 2))
        sides = {"base": (dims[:2], base[..., 0]), "source": (dims[:2], base[::-1, :, 0])}
        results.save(xr.Dataset({"effect": (dims, effect), **sides}, coords), tmp_path / f"seed-{seed}.h5")
    with in_small(null_control, N_EXCHANGES=499, N_HALVES=10):
        rows = rows_of(call(null_control, "--out", tmp_path))
    called = [row[2] for row in rows if row[:2] == ["all", "both"]]
    assert called[0] == "4 of 4"
    assert called[1] in ("0 of 4", "1 of 4")
    (mixing,) = (row for row in rows if row[0] == "a")
    assert float(mixing[1].split()[0]) == pytest.approx(1, abs=0.1)
    assert [row[0] for row in rows][-1] == "reliable − unreliable"


def test_tags_say_nothing_in_runs_of_the_default_study_whose_seeds_nobody_saw():
    config = null_control.without_meaning(null_control.SEEDS[0])
    assert config.task.x1_tags == "random"
    assert config.phases.x2.steps > null_control.X2_STEP
    assert not {*null_control.SEEDS} & {*range(400, 427)}
    assert len(null_control.SEEDS) == RUNS
