"""The account's analysis, in miniature: files for every run, tables that follow from them."""

import numpy as np
import pytest

from dynamics import results
from scripts.experiments import account
from tests.scripts.calling import call, in_small, named, rows_of


@pytest.mark.slow
def test_what_wrote_it_and_whether_it_is_causal_is_kept_and_told(alias_runs, tmp_path):
    small = {"AFTER": (1, 2), "HEADS_UNTIL": 1, "HALVES": 4, "RETRAINED": 3, "EVERY": 2, "EARLY": 20}
    with in_small(account, **small):
        printed = call(account, *alias_runs)
        assert call(account, *alias_runs) == printed  # from what is kept
    kept = tmp_path / "runs" / "account"
    rows = {row[0]: row for row in rows_of(printed)}
    folders = named(kept, "")
    changes, written = [], []
    for folder in folders.values():
        whole = results.difference(results.load(folder / "whole.h5"), "Dt3", "Df4")
        components = whole["attribution"].isel(site=whole["level"].values == "components")
        changes.append(float(whole["value"][-1] - whole["value"][0]))
        written.append(float(components.sel(source="definitions of Dt3").sum()))
        assert float(components.sum()) == pytest.approx(changes[-1], abs=0.02)
    first = results.difference(results.load(folders[0] / "whole.h5"), "Dt3", "Df4")
    assert int(first["step"][2] - first["step"][0]) == small["EARLY"]
    early = []
    for folder in folders.values():
        value = results.difference(results.load(folder / "whole.h5"), "Dt3", "Df4")["value"]
        early.append(float(value[2] - value[0]))
    assert rows["change of D"][1].startswith(f"{np.mean(early):+.2f}")
    assert rows["change of D"][2].startswith(f"{np.mean(changes):+.2f}")
    assert rows["source: definitions of Dt3"][2].startswith(f"{np.mean(written):+.2f}")
    halves = results.load(folders[0] / "halves.h5")
    assert (halves["kept"].sum("definition") == halves.sizes["definition"] // 2).all()
    assert len(np.unique(halves["end"])) > 1
    assert (kept / "account.png").stat().st_size > 10_000


def test_a_window_that_the_account_foretells_has_a_correlation_of_one():
    """Scores are compared site by site, by their labels."""
    sites = ["embed", "attn 0", "mlp 0"]
    import xarray as xr

    effect = np.array([0.3, -0.2, 0.1])
    table = {"Dt3": effect}
    windows = xr.Dataset(
        {
            "window": (("step", "site"), [effect] * 3),
            "window under noise": (("step", "site"), [-effect] * 3),
            "impulse": (("step", "site"), [effect[[1, 0, 2]]] * 3),
            "window of heads": (("step", "head_site"), [[1.0, 2.0]] * 3),
            "fresh": ("site", effect),
            "stored": ("site", effect),
            "distance": (("step", "site"), [abs(effect)] * 3),
        },
        {"step": list(account.AFTER), "site": sites, "head_site": ["L0H0", "L0H1"]},
    )
    steps = max(account.AFTER) + 1
    written = np.zeros((2, steps, 3))
    written[1, 1] = table["Dt3"]
    paths = xr.Dataset(
        {"attribution": (("direction", "step", "site"), written)},
        {"direction": ["as trained", "retagged"], "site": sites},
    )
    scores = account._scores(windows, paths, "components", sites, account.AFTER[0])
    np.testing.assert_allclose(scores["account"], effect)
    np.testing.assert_allclose(scores["window under noise"], -effect)
    np.testing.assert_array_equal(account._window(windows, "components", sites[::-1], 10), effect[::-1])
