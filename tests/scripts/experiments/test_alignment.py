"""Gradient alignment along training, in miniature: a row for what parts; events and tags by hand."""

import numpy as np
import pytest
import xarray as xr

from dynamics import results
from scripts.experiments import alignment
from tests.scripts.calling import call, in_small, named, rows_of


@pytest.mark.slow
def test_alignment_has_a_row_for_what_parts_in_each_phase(alias_runs, tmp_path):
    with in_small(alignment, POINTS=5):
        said = call(alignment, *alias_runs, "--out", "aligned")
    table = rows_of(said)
    assert [row[:2] for row in table[2:]] == [
        ["X1", "accuracy, DtQ1 − DfQ2"],
        ["X1", "alignment, as trained, DtQ1 − DfQ2"],
        ["X2", "accuracy, Dt3 − Df4"],
        ["X2", "alignment, as trained, Dt3 − Df4"],
        ["X1, X2", "accuracy, Dt3 − Df4"],
        ["X1, X2", "alignment, either tag, reliable − unreliable"],
        ["X1, X2", "attention to the tag"],
    ]
    for folder in named(tmp_path / "aligned", "").values():
        trained, exchanged = (results.load(folder / f"{name}.h5") for name in ("trained", "exchanged"))
        assert trained.sizes["step"] == exchanged.sizes["step"]
        assert not np.array_equal(trained["own"], exchanged["own"])
    folders = named(tmp_path / "aligned", "").values()
    first = [results.load(folder / "scores.h5")["accuracy"].isel(step=0) for folder in folders]
    gap = np.mean([float(a.sel(example="DtQ1") - a.sel(example="DfQ2")) for a in first])
    assert table[2][2].startswith(f"{gap:+.2f} ")
    assert (tmp_path / "aligned" / "alignment.png").stat().st_size > 10_000
    with in_small(alignment, POINTS=5):
        assert call(alignment, *alias_runs, "--out", "aligned") == said


def test_an_event_is_found_and_averaged_on_the_scale_of_log_steps():
    steps = np.array([0, 1, 3, 9, 27, 81])
    late = np.array([steps >= 3, steps >= 27, steps >= 81 * 2], float)
    found = alignment.event(xr.DataArray(late, dims=("seed", "step"), coords={"step": steps}))
    np.testing.assert_allclose(found["at"], [3, 27, np.nan])
    assert int(found["n"]) == 2
    np.testing.assert_allclose(found["mean"], np.sqrt(4 * 28) - 1)
    assert float(found["low"]) >= 0


def test_the_same_aliases_stand_under_either_tag():
    labels = {"example": ["a", "b", "c"], "set": ["Dt3", "Df4", "Df4"]}
    coords = {**results.coordinates(labels, "example"), "site": ["everything"], "step": [5, 6]}

    def own(values):
        array = np.broadcast_to(np.asarray(values, float), (2, 1, 3))
        return xr.Dataset({"own": (("step", "site", "example"), array)}, coords)

    pairs = {"accuracy": (("step", "example"), np.zeros((2, 2)))}
    scores = xr.Dataset(pairs, {"example": ["Dt3", "Df4"], "step": [5, 6]})
    looked = {"attention": (("step", "measure", "site"), np.full((2, 2, 1), 0.5))}
    roles = xr.Dataset(looked, {"measure": ["to tag", "to alias"], "step": [5, 6]})
    run = {"trained": own([1, 20, 30]), "exchanged": own([4, 50, 60]), "scores": scores, "roles": roles}
    panels = alignment.panels([run], ("Dt3", "Df4"), 5, 6)
    np.testing.assert_allclose(panels["alignment, either tag"]["reliable"], (1 + 50 + 60) / 3)
    np.testing.assert_allclose(panels["alignment, either tag"]["unreliable"], (4 + 20 + 30) / 3)
    np.testing.assert_allclose(panels["alignment, as trained"]["Df4"], 25)
    assert panels["accuracy"]["step"].values.tolist() == [0, 1]
