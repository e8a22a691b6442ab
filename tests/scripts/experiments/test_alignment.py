"""The order of events, in miniature: curves of each phase, and events by hand."""

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory
from dynamics import results
from scripts.experiments import alignment
from tests.scripts.calling import call, forks_of, in_small, named, rows_of


@pytest.mark.slow
def test_each_phase_has_a_row_for_all_that_may_change(alias_runs, tmp_path):
    for seed, run in zip((400, 401), alias_runs, strict=True):
        forks_of(tmp_path / "forks", run, seed)
    with in_small(alignment, POINTS=5):
        said = call(alignment, tmp_path / "forks", "--out", "aligned")
        assert call(alignment, tmp_path / "forks", "--out", "aligned") == said
    rows = [row for row in rows_of(said)[2:] if row[0] in ("X1", "X2") and len(row) == 7]
    assert [row[:2] for row in rows] == [
        [phase, words.format(*pair)]
        for phase, pair in (("X1", ("DtQ1", "DfQ2")), ("X2", ("Dt3", "Df4")))
        for words in (
            "accuracy, {} − {}",
            "alignment, {} − {}",
            "alignment by tag, reliable − unreliable",
            "single step, fresh",
            "single step, stored",
            "attention, to the tag",
        )
    ]
    first = [
        results.load(path)["accuracy"].isel(step=0) for path in named(tmp_path / "aligned", ".h5").values()
    ]
    gap = np.mean([float(a.sel(set="DtQ1") - a.sel(set="DfQ2")) for a in first])
    assert rows[0][2].startswith(f"{gap:+.2f} ")
    assert (tmp_path / "aligned" / "alignment.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_single_step_is_what_the_reliable_tag_adds_to_it(alias_runs):
    run = Trajectory.open(alias_runs[0])
    task = dy.tasks.load(run.config)
    with in_small(alignment, POINTS=2):
        found = alignment.curves(task, run)
    recipe, state = task.recipe(), run.at(task.config.phases.starts["x2"])
    gains = []
    for contrast in task.contrasts():
        ends = [
            dy.steps.advance(recipe, state, state.step + 1, lambda _, b=b: b)
            for b in (contrast.source, contrast.base)
        ]
        means = []
        for end in ends:
            end.restore(recipe.model)
            means.append(float(alignment.MEASURE(recipe.model.eval(), contrast.probe).mean().detach()))
        gains.append(means[0] - means[1])
    expected = pytest.approx(np.mean(gains), abs=1e-5)
    assert float(found["single step"].sel(step=state.step, optimizer="stored")) == expected


def test_an_event_is_found_and_averaged_on_the_scale_of_log_steps():
    steps = np.array([0, 1, 3, 9, 27, 81])
    late = np.array([steps >= 3, steps >= 27, steps >= 81 * 2], float)
    found = alignment.event(xr.DataArray(late, dims=("seed", "step"), coords={"step": steps}))
    np.testing.assert_allclose(found["at"], [3, 27, np.nan])
    assert int(found["n"]) == 2
    np.testing.assert_allclose(found["mean"], np.sqrt(4 * 28) - 1)
    assert float(found["low"]) >= 0


def test_curves_are_away_from_zero_where_they_do_not_come_back():
    around = np.array([[0.5], [1.0], [1.5]])
    for means, expected in (([0, 4, 0, 4, 4], "9"), ([0, -4, 4, 4, 4], "1"), ([4, 4, 4, 4, 0], "–")):
        curve = xr.DataArray(around - 1 + means, dims=("seed", "step"), coords={"step": [0, 1, 3, 9, 27]})
        assert alignment.apart_from(curve) == expected


def test_the_same_aliases_stand_under_either_tag():
    """Of Df4 training has the unreliable tag: what it would do under the reliable one is the other batch's."""
    aligned = xr.Dataset(
        {"base": ("example", [7.0, 1.0, 20.0, 30.0]), "source": ("example", [7.0, 4.0, 50.0, 60.0])},
        {"set": ("example", ["DtQ1", "Dt3", "Df4", "Df4"])},
    )
    found = alignment.by_tag(aligned)
    np.testing.assert_allclose(found.sel(tag="reliable"), (1 + 50 + 60) / 3)
    np.testing.assert_allclose(found.sel(tag="unreliable"), (4 + 20 + 30) / 3)


def _fork(steps, x):
    """A fork's curves of one number each; X2 begins at step 2 and ends at 4."""
    shape = (len(steps), 1)
    level = np.broadcast_to(np.asarray(x, float)[:, None], shape)
    sets = ["DtQ1", "DfQ2", "Dt3", "Df4"]
    return xr.Dataset(
        {
            "accuracy": (("step", "set"), level * [1, 2, 3, 4]),
            "alignment": (("step", "set"), level * [1, 2, 3, 4]),
            "alignment by tag": (("step", "tag"), level * [2, 1]),
            "single step": (("step", "optimizer"), level * [1, 2]),
            "attention": ("step", level[:, 0]),
        },
        {"step": steps, "set": sets, "tag": list(alignment.TAGS), "optimizer": ["fresh", "stored"]},
        {"x1": 0, "x2": 2, "end": 4},
    )


def test_x1_is_the_first_forks_and_x2_the_mean_of_both():
    """The second fork begins where X2 does."""
    found = {7: [_fork([0, 1, 2, 4], [1, 2, 3, 4]), _fork([2, 4], [5, 6])]}
    first, second = (alignment.panels(found, phase) for phase in ("x1", "x2"))
    assert first["accuracy"]["DtQ1"].values.tolist() == [[1, 2, 4]]
    assert second["accuracy"]["Dt3"].values.tolist() == [[12, 15]]
    assert second["accuracy"]["step"].values.tolist() == [0, 2]
    gap = alignment.events(second)["alignment by tag, reliable − unreliable"][1]
    assert gap.values.tolist() == [[4, 5]]


def test_the_order_says_by_what_factor_the_second_event_is_later():
    """Accuracy parts at step 9, alignment at step 1, in both seeds: log steps of 10 and 2."""
    steps = np.array([0, 1, 3, 9, 27])

    def curve(at):
        return xr.DataArray(np.array([steps >= at] * 2, float), dims=("seed", "step"), coords={"step": steps})

    panels = {
        "accuracy": xr.Dataset({"Dt3": curve(9), "Df4": 0 * curve(9)}),
        "alignment": xr.Dataset({"Dt3": curve(3), "Df4": 0 * curve(3)}),
        "attention": xr.Dataset({"to the tag": 0 * curve(3)}),
    }
    (row,) = rows_of("\n".join(alignment.order({"x2": panels})))[2:]
    assert row[:3] == ["X2", "accuracy, Dt3 − Df4", "alignment, Dt3 − Df4"]
    assert row[3].startswith("×0.4 [")  # (1 + 3) / (1 + 9)
    (dash,) = [row for row in rows_of("\n".join(alignment.table({"x2": panels}))) if row[1].startswith("att")]
    assert dash[3:] == ["–", "–", "0 of 2", "–"]
