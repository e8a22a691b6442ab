"""Curves with events, and maps under accuracies, show the numbers they are given."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import LogNorm
from matplotlib.container import BarContainer

from dynamics import plots, results, statistics
from dynamics.comparison import when

STEPS = [0, 1, 3, 10, 30, 100]


def curve(values, **dims):
    array = np.asarray(values, float)
    names = ("seed", "step") if array.ndim == 2 else ("step",)
    return xr.DataArray(array, dims=names, coords={"step": STEPS})


def scores():
    values = np.linspace(0, 1, 2 * len(STEPS)).reshape(2, -1)
    return xr.Dataset(
        {"accuracy": (("example", "step"), values)}, coords={"example": ["Dt3", "own"], "step": STEPS}
    )


def site_map(values):
    array = np.asarray(values, float)
    coords = {"site": [f"part {i}" for i in range(len(array))], "step": STEPS[1:]}
    return xr.Dataset({"moved": (("site", "step"), array, {"long_name": "how far it moved"})}, coords)


# --- curves and events ------------------------------------------------------------------------------------


def test_a_curve_over_seeds_is_its_mean_with_the_interval_and_an_event_a_line():
    values = np.array([[0, 0, 0, 1, 1, 1.2], [0, 0.1, 0, 0.1, 1, 1], [0.1, 0, 0, 1, 1.1, 1]])
    several = curve(values)
    panel = xr.Dataset({"Dt3": several, "mine": -several}, attrs={"long_name": "alignment"})
    event = when(several)
    figure = plots.event_curves({"X2": [(panel, {"they part": event})]})
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["reliable, defined only (Dt3)"].get_ydata(), values.mean(0))
    np.testing.assert_allclose(lines["mine"].get_ydata(), -values.mean(0))
    np.testing.assert_allclose(lines["they part"].get_xdata(), float(event["mean"]))
    band = axes.collections[0].get_paths()[0].vertices
    _, low, high = statistics.mean_interval(values.T)
    assert band[:, 1].min() == pytest.approx(low.min())
    assert band[:, 1].max() == pytest.approx(high.max())
    (span,) = [patch for patch in axes.patches if patch.get_alpha() == 0.15]
    assert span.get_x() == pytest.approx(max(0.0, float(event["low"])))
    assert span.get_x() + span.get_width() == pytest.approx(float(event["high"]))
    assert axes.get_ylabel() == "alignment"
    assert [part.get_suptitle() for part in figure.subfigs] == ["X2"]


@pytest.mark.parametrize(
    ("words", "ends"), [("accuracy", True), ("attention to the tag", True), ("alignment", False)]
)
def test_the_axis_of_a_share_ends_at_zero_and_one_though_an_interval_goes_on(words, ends):
    panel = xr.Dataset(
        {"mine": curve([[0, 1, 1, 1, 1, 1], [0.1, 0.9, 1, 1, 1, 0.2]])}, attrs={"long_name": words}
    )
    (axes,) = plots.event_curves({"X2": [(panel, {})]}).axes
    assert (axes.get_ylim() == (0.0, 1.0)) == ends


def test_one_runs_event_is_where_it_changes_and_none_is_not_drawn():
    one, flat = curve([0, 0, 0, 0, 1, 1]), curve([0.5] * 6)
    panels = [
        (xr.Dataset({"a": one}), {"change": when(one)}),
        (xr.Dataset({"a": flat}), {"change": when(flat)}),
    ]
    figure = plots.event_curves({"X1": panels})
    above, below = figure.axes
    (mark,) = [line for line in above.lines if line.get_label() == "change"]
    np.testing.assert_allclose(mark.get_xdata(), 30)
    assert not [line for line in below.lines if line.get_label() == "change"]


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"X1": []},
        {
            "X1": [(xr.Dataset({"a": curve([0] * 6)}), {})],
            "X2": [(xr.Dataset({"a": curve([0] * 6)}), {})] * 2,
        },
        {"X1": [(xr.Dataset({"a": curve([0] * 6).expand_dims(site=2)}), {})]},
    ],
)
def test_columns_that_do_not_match_and_curves_with_other_dims_are_refused(columns):
    with pytest.raises(ValueError, match=r"panels; expected|expected step"):
        plots.event_curves(columns)


# --- maps -------------------------------------------------------------------------------------------------


def test_a_map_has_a_row_for_each_site_and_the_accuracies_of_its_own_steps_above():
    values = np.arange(15.0).reshape(3, 5) / 10 + 0.5
    figure = plots.map_under_accuracies(site_map(values), "moved", scores())
    above, below, bar = figure.axes
    (image,) = below.images
    np.testing.assert_array_equal(image.get_array(), values)
    assert [label.get_text() for label in below.get_yticklabels()] == ["part 0", "part 1", "part 2"]
    assert [label.get_text() for label in below.get_xticklabels()] == [str(step) for step in STEPS[1:]]
    reliable = next(line for line in above.lines if line.get_label().endswith("(Dt3)"))
    np.testing.assert_array_equal(reliable.get_ydata(), scores()["accuracy"].sel(example="Dt3")[1:])
    assert bar.get_ylabel().replace("\n", " ") == "how far it moved"
    assert (image.norm.vmin, image.norm.vmax) == (0.0, values.max())
    figure.draw_without_rendering()
    assert bar.yaxis.label.get_window_extent().y0 >= 0
    assert bar.yaxis.label.get_window_extent().y1 <= figure.bbox.y1


def test_both_signs_diverge_from_white_and_decades_are_logarithmic():
    signed = np.linspace(-1, 3, 15).reshape(3, 5)
    (image,) = plots.map_under_accuracies(site_map(signed), "moved", scores()).axes[1].images
    assert (image.norm.vmin, image.norm.vmax) == (-3.0, 3.0)
    decades = np.logspace(-5, 0, 15).reshape(3, 5)
    decades[0, 0] = 0.0
    (image,) = plots.map_under_accuracies(site_map(decades), "moved", scores()).axes[1].images
    assert isinstance(image.norm, LogNorm)
    assert image.norm.vmax == 1.0
    assert float(image.norm(0.0)) == 0.0  # zero has the lightest colour, it is not missing


def test_a_cell_without_a_number_is_empty_and_a_map_of_nothing_is_drawn():
    values = np.ones((2, 5))
    values[1, 2] = np.nan
    (image,) = plots.map_under_accuracies(site_map(values), "moved", scores()).axes[1].images
    assert np.ma.getmaskarray(image.get_array()).nonzero() == (np.array([1]), np.array([2]))
    plots.map_under_accuracies(site_map(values * np.nan), "moved", scores())


def test_steps_without_accuracies_and_dims_that_are_left_are_refused():
    few = scores().isel(step=slice(0, 3))
    with pytest.raises(ValueError, match=r"lack steps \[10, 30, 100\]"):
        plots.map_under_accuracies(site_map(np.ones((2, 5))), "moved", few)
    with pytest.raises(ValueError, match="example"):
        plots.map_under_accuracies(site_map(np.ones((2, 5))).expand_dims(example=3), "moved", scores())


# --- two checkpoints --------------------------------------------------------------------------------------


def test_what_moved_most_comes_first_and_aliases_have_the_colour_of_their_set():
    coords = results.coordinates({"site": ["a", "b", "c"]}, "site")
    relative = ("site", [0.1, 0.5, 0.3], {"long_name": "moved", "units": "1"})
    weights = xr.Dataset({"relative": relative}, coords)
    labels = {"example": ["alias 1", "alias 2"], "set": ["Df4", "Dt3"]}
    kl = ("example", [0.2, 0.4], {"long_name": "KL", "units": "nat"})
    logits = xr.Dataset({"kl": kl}, results.coordinates(labels, "example"))
    left, right = plots.moved(weights, logits, most=2).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["b", "c"]
    assert [bar.get_width() for bar in left.patches] == [0.5, 0.3]
    assert [label.get_text() for label in right.get_yticklabels()] == ["alias 2", "alias 1"]
    assert right.get_xlabel() == "KL (nat)"
    bars = next(bar for bar in right.containers if isinstance(bar, BarContainer))
    handles, words = right.get_legend_handles_labels()
    colours = {word: handle[0].get_facecolor() for word, handle in zip(words, handles, strict=True)}
    assert bars[0].get_facecolor() == colours["reliable, defined only (Dt3)"]
    assert bars[1].get_facecolor() == colours["unreliable, defined only (Df4)"]
