"""Other settings: each differs from the default in one thing, and sentences are counted by seed."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import xarray as xr

from scripts.experiments import forecast, other_settings, single_step_map, window_floor
from scripts.shared.forks import CONFIRMED, EXPLORED
from tests.scripts.calling import call, in_small, rows_of


def _flat(nested, prefix=""):
    return {
        path: value
        for key, part in nested.items()
        for path, value in (
            _flat(part, f"{prefix}{key}.") if isinstance(part, dict) else {f"{prefix}{key}": part}
        ).items()
    }


def test_every_setting_differs_from_the_default_in_the_one_thing_it_is_called_by():
    default = _flat(asdict(other_settings.DEFAULT))
    differing = {
        name: {path: value for path, value in _flat(asdict(config)).items() if default[path] != value}
        for name, config in other_settings.SETTINGS.items()
    }
    assert differing == {
        "default": {},
        "modulus 120": {"task.modulus": 120},
        "four layers": {"model.n_layers": 4},
        "sums": {"task.operation": "sum"},
        "batch 32": {"phases.batch_size": 32},
        "no decay": {"phases.weight_decay": 0.0},
    }
    assert not {*other_settings.SEEDS} & {*EXPLORED, *CONFIRMED}


def test_a_sentence_is_counted_in_the_seeds_where_it_is_so():
    def fork(value, whole=1.0):
        recovery = xr.DataArray([[[value]]], dims=("step", "optimizer", "site"))
        coords = {"step": [single_step_map.PRIMARY], "optimizer": ["fresh"], "site": ["embed"]}
        return xr.Dataset({"recovery": recovery, "whole": (("step", "optimizer"), [[whole]])}, coords)

    found = {1: [fork(1.0), fork(-0.5)], 2: [fork(-1.0), fork(0.5)], 3: [fork(0.2), fork(0.2)]}
    found[4] = [fork(0.5, 10.0), fork(-9.0, 0.1)]  # 4.1 of 10.1, whatever the mean of the ratios is
    assert [*other_settings.map_holds(found).values()] == ["3 of 4"]


def test_windows_are_counted_by_their_length():
    def fork(effect):
        return xr.Dataset(
            {
                "effect": (("step", "site"), [[effect], [effect / 10]]),
                "noisy": (("noise", "step", "site"), np.zeros((2, 2, 1))),
                "random": (("placebo", "step", "site"), np.full((1, 2, 1), 0.5)),
            },
            {"step": [10, 20], "site": ["embed"]},
        )

    with in_small(other_settings, AFTER=(10, 20)):
        found = other_settings.window_holds({1: [fork(1.0)] * 2, 2: [fork(6.0)] * 2, 3: [fork(0.1)] * 2})
    assert found == {"embed: told from noise and placebos after 10, 20 steps": "2, 1 of 3"}


def test_nothing_is_said_of_a_forecast_where_all_aliases_share_one_fate():
    draws = np.random.default_rng(0)

    def fork(fates):
        names = forecast.columns(forecast.KINDS)
        known = {name: ("example", draws.standard_normal(len(fates))) for name in names}
        known["account"] = ("example", np.array(fates) + 0.1 * draws.standard_normal(len(fates)))
        return xr.Dataset({**known, "internalised": ("example", np.array(fates, float))})

    mixed = {seed: [fork([0, 1] * 20)] for seed in (1, 2, 3)}
    words = "forecast: AUROC above .5"
    assert other_settings.forecast_holds(mixed)[words] == "3 of 3"
    assert other_settings.forecast_holds({1: [fork([0] * 4)], 2: [fork([0] * 4)], 3: [fork([0, 1])]}) == {}
    table = other_settings.table({"one": {words: "3 of 3"}, "other": {}})
    assert rows_of("\n".join(table))[2] == [words, "3 of 3", "–"]


@pytest.mark.slow
def test_settings_are_trained_asked_and_counted(alias_config, tmp_path):
    small = replace(alias_config, phases=replace(alias_config.phases, weight_decay=0.0))
    with (
        in_small(other_settings, SETTINGS={"no decay": small}, SEEDS=(1,), AFTER=(1,)),
        in_small(single_step_map, X2_STEPS=(2,), PRIMARY=2, N_PLACEBOS=2),
        in_small(window_floor, N_NOISE=2, N_PLACEBOS=1),
        in_small(forecast, KNOWN_AFTER=4),
    ):
        said = call(other_settings, tmp_path / "runs", "--out", tmp_path / "found")
        assert call(other_settings, tmp_path / "runs", "--out", tmp_path / "found") == said
    head, _, *rows = rows_of(said)
    assert head[1:] == ["no decay"]
    assert {cell[-4:] for row in rows for cell in row[1:]} <= {"of 1", "–"}
    assert len([row for row in rows if "recovery above 0" in row[0]]) == 10
    assert (tmp_path / "runs" / "no-decay" / "seed-1" / "exchanged").exists()
