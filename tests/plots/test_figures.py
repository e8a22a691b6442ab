"""Figures show the numbers they are given, with their units, and leave matplotlib as it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation

from dynamics import plots, results, statistics
from dynamics.config import StudyConfig
from dynamics.plots.figures import number

N_LAYERS, N_HEADS = 2, 3


def build(gap: float = 1.5, seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    n = N_LAYERS * N_HEADS
    base, gaps = rng.normal(2.0, 1.0, 30), rng.normal(gap, 0.6, 30)
    patched = base[:, None] + gaps[:, None] * np.linspace(-0.5, 1, n) + rng.normal(0, 0.2, (30, n))
    layer, head = np.divmod(np.arange(n), N_HEADS)
    sites = {
        "site": [f"L{i}H{j}" for i, j in zip(layer, head, strict=True)],
        "layer": list(layer),
        "head": list(head),
    }
    examples = {"example": [f"alias {i}" for i in range(30)]}
    return results.effects(
        patched, {"base": base, "source": base + gaps}, examples, sites, None, "logits", "{}"
    )


def over_steps(steps: tuple[int, ...] = (0, 50, 400)) -> xr.Dataset:
    return results.concat([build(seed=i) for i in range(len(steps))], "step", steps)


def over_optimizers() -> xr.Dataset:
    return statistics.summarize(
        results.concat([build(seed=i) for i in range(2)], "optimizer", ["stored", "fresh"])
    )


def metrics() -> pd.DataFrame:
    steps = np.arange(0, 100, 10)
    sets = {"DtQ1": 0.9, "DfQ2": 0.8, "Dt3": 0.6, "Df4": 0.3, "heldout": 1.0}
    columns = {f"{name}_accuracy": top * steps / 90 for name, top in sets.items()}
    frame = pd.DataFrame({"step": steps, "loss": 1.0, **columns})
    frame.loc[1::2, "heldout_accuracy"] = np.nan
    return frame


@pytest.fixture(autouse=True)
def _matplotlib_stays_as_it_was() -> Iterator[None]:
    """No figure may change the theme, or become known to pyplot."""
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_every_head_is_one_cell_with_its_mean_effect() -> None:
    figure = plots.heatmap(build())
    axes = figure.axes[0]
    cells = axes.images[0].get_array()
    assert cells is not None
    expected = build()["effect"].mean("example").values.reshape(N_LAYERS, N_HEADS)
    np.testing.assert_allclose(np.asarray(cells), expected)
    assert texts(figure) == [f"{cell:.2f}".replace("-", "−") for cell in expected.ravel()]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert axes.get_title() == "Mean effect by layer and head\n30 examples of one run"


def test_the_colours_diverge_from_zero_as_far_to_either_side_and_carry_the_units() -> None:
    figure = plots.heatmap(build())
    image = figure.axes[0].images[0]
    low, high = image.get_clim()
    assert high == -low == np.abs(np.asarray(image.get_array())).max()
    assert figure.axes[1].get_ylabel() == "effect (logits)"


def test_a_map_of_a_summary_is_the_map_of_its_result() -> None:
    raw, summary = plots.heatmap(build()), plots.heatmap(statistics.summarize(build()))
    np.testing.assert_array_equal(raw.axes[0].images[0].get_array(), summary.axes[0].images[0].get_array())
    assert texts(raw) == texts(summary)


def test_recovery_has_no_units_and_is_not_called_a_mean() -> None:
    figure = plots.heatmap(build(), value="recovery")
    assert figure.axes[1].get_ylabel() == "recovery"
    assert figure.axes[0].get_title().splitlines()[0] == "Recovery by layer and head"


def test_a_site_without_a_number_stays_an_empty_cell() -> None:
    dataset = build()
    dataset["effect"][:, 4] = np.nan
    figure = plots.heatmap(dataset)
    assert np.ma.getmaskarray(np.ma.asarray(figure.axes[0].images[0].get_array()))[1, 1]
    assert len(texts(figure)) == N_LAYERS * N_HEADS - 1


def test_sites_without_a_layer_have_a_row_of_their_own() -> None:
    dataset = build().isel(site=slice(0, 4))
    dataset["layer"] = ("site", [-1, 0, 0, 1])
    dataset["component"] = ("site", ["embed", "attn", "mlp", "attn"])
    axes = plots.heatmap(dataset, x="component").axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["none", "0", "1"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["embed", "attn", "mlp"]


def test_several_values_in_one_cell_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"2 values fall in the cell head 0, layer 0: \['L0H0', 'L1H0'\]"):
        plots.heatmap(build().assign_coords(layer=("site", [0] * 6)))
    for dataset in (over_steps(), statistics.summarize(over_steps())):
        with pytest.raises(ValueError, match=r"several values for \['step'\].*\.sel\(step="):
            plots.heatmap(dataset)
    with pytest.raises(ValueError, match="no 'attribution'"):
        plots.heatmap(build(), value="attribution")
    with pytest.raises(ValueError, match="no coordinate 'pos'"):
        plots.heatmap(build(), x="pos")


def test_a_selected_step_is_named_in_the_title() -> None:
    assert "step 50" in plots.heatmap(over_steps().sel(step=50)).axes[0].get_title()


def test_large_maps_have_no_numbers() -> None:
    summary = statistics.summarize(over_steps()).isel(step=0)
    wide = xr.concat([summary] * 70, "site", data_vars="minimal", coords="minimal", compat="override")
    wide = wide.assign_coords(site=[f"site {i}" for i in range(420)], layer=("site", np.arange(420) // 20))
    figure = plots.heatmap(wide.assign_coords(head=("site", np.arange(420) % 20)))
    assert texts(figure) == []


def test_sites_run_down_and_steps_run_across_in_the_order_of_training() -> None:
    summary = statistics.summarize(over_steps((0, 50, 400)))
    axes = plots.site_by_step(summary.isel(step=[2, 0, 1])).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "50", "400"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == summary["site"].values.tolist()
    np.testing.assert_array_equal(axes.images[0].get_array(), summary["effect"].transpose("site", "step"))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "site")
    with pytest.raises(ValueError, match="expected site and step"):
        plots.site_by_step(summary.isel(step=0))


def test_recoveries_show_every_site_with_its_interval_between_lines_at_0_and_1() -> None:
    summary = statistics.summarize(build())
    axes = plots.recoveries(summary).axes[0]
    line, _, (bars,) = axes.containers[0]
    np.testing.assert_array_equal(line.get_xdata(), summary["recovery"])
    ends = np.array([segment[:, 0] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends.T, [summary["recovery_low"], summary["recovery_high"]])
    lines = {
        float(np.asarray(other.get_xdata())[0]) for other in axes.lines if np.size(other.get_xdata()) == 2
    }
    assert lines == {0.0, 1.0}
    assert axes.get_xlabel() == "recovery"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == summary["site"].values.tolist()
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first site on top


def test_without_a_gap_the_effects_are_shown_and_the_axis_says_why() -> None:
    summary = statistics.summarize(build(gap=0.0))
    axes = plots.recoveries(summary).axes[0]
    np.testing.assert_array_equal(axes.containers[0][0].get_xdata(), summary["effect"])
    assert axes.get_xlabel() == "effect (logits); no recovery: the gap may be zero"


def test_stored_and_fresh_has_one_point_per_site_and_the_identity() -> None:
    summary = over_optimizers()
    axes = plots.stored_and_fresh(summary).axes[0]
    points = axes.containers[0][0]
    np.testing.assert_array_equal(points.get_xdata(), summary["effect"].sel(optimizer="stored"))
    np.testing.assert_array_equal(points.get_ydata(), summary["effect"].sel(optimizer="fresh"))
    identity = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert len(identity) == 1
    np.testing.assert_array_equal(identity[0].get_xdata(), identity[0].get_ydata())
    assert axes.get_xlabel() == "effect (logits), stored optimizer state"
    assert axes.get_ylabel() == "effect (logits), fresh optimizer state"


def test_named_sites_do_not_cover_each_other() -> None:
    summary = over_optimizers()
    tight = summary.assign(effect=0.5 + 1e-3 * summary["effect"])  # all points within a few pixels
    for dataset in (summary, tight):
        figure = plots.stored_and_fresh(dataset)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        assert boxes
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_stored_and_fresh_wants_both_and_nothing_else_open() -> None:
    with pytest.raises(ValueError, match="lacks the optimizer values"):
        plots.stored_and_fresh(statistics.summarize(build()))
    both = results.concat([over_optimizers(), over_optimizers()], "step", [0, 1])
    with pytest.raises(ValueError, match=r"several values for \['step'\]"):
        plots.stored_and_fresh(both)


def test_accuracies_draw_every_set_where_it_was_measured() -> None:
    axes = plots.accuracies(metrics(), {}, {}).axes[0]
    drawn = {str(line.get_label()): line for line in axes.lines}
    assert len(drawn) == 5
    assert np.size(drawn["held out"].get_xdata()) == 5
    reliable, unreliable = drawn["reliable, defined only (Dt3)"], drawn["unreliable, defined only (Df4)"]
    np.testing.assert_array_equal(unreliable.get_ydata(), metrics()["Df4_accuracy"])
    assert (to_hex(reliable.get_color()), to_hex(unreliable.get_color())) == ("#0072b2", "#d55e00")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "accuracy")
    assert axes.get_ylim() == (0.0, 1.0)


def test_unknown_sets_of_questions_are_drawn_in_colours_of_their_own() -> None:
    frame = metrics().rename(columns={"heldout_accuracy": "table_accuracy"})
    axes = plots.accuracies(frame, {}, {}).axes[0]
    colours = {str(line.get_label()): to_hex(line.get_color()) for line in axes.lines}
    assert "table" in colours
    assert len(set(colours.values())) == 5


def test_phases_and_guesses_are_lines_whose_names_do_not_cover_each_other() -> None:
    phases = {"pretraining": 0, "first": 40, "just after": 42, "and after that": 43}
    chance = {"one of 60": 1 / 60, "one of 50": 1 / 50}
    figure = plots.accuracies(metrics(), phases, chance)
    axes = figure.axes[0]
    upright = sorted(
        float(np.asarray(line.get_xdata())[0]) for line in axes.lines if np.size(line.get_xdata()) == 2
    )
    dotted = [float(np.asarray(line.get_ydata())[0]) for line in axes.lines if line.get_linestyle() == ":"]
    assert [x for x in upright if x in phases.values()][-3:] == [40, 42, 43]
    assert dotted == list(chance.values())
    assert set(texts(figure)) == {*phases, *chance}
    figure.draw_without_rendering()
    notes = [text for text in axes.texts if isinstance(text, Annotation)]
    boxes = [text.get_window_extent() for text in notes]
    assert len(boxes) == 6
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_the_legend_lies_outside_of_the_data() -> None:
    figure = plots.accuracies(metrics(), {"X1": 0}, {"chance": 0.1})
    figure.draw_without_rendering()
    legend, data = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.y1 <= data.y0
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1


def test_metrics_without_steps_or_accuracies_are_refused() -> None:
    for column in ("step", "_accuracy"):
        frame = metrics()
        frame = frame.drop(columns=[name for name in frame.columns if name.endswith(column)])
        with pytest.raises(ValueError, match="expected 'step' and some that"):
            plots.accuracies(frame, {}, {})


def test_a_saved_figure_is_a_png_at_150_dpi_with_its_provenance(tmp_path: Path) -> None:
    figure = plots.recoveries(statistics.summarize(build()))
    path = tmp_path / "figures" / "recovery.png"
    fact = json.dumps({"seed": 7})
    for _ in range(2):  # made again, it replaces the older one
        plots.save(figure, path, {"provenance": fact})
    height, width, _ = imread(path).shape
    assert (width, height) == tuple(np.floor(figure.get_size_inches() * 150).astype(int))
    assert b"provenance\x00" + fact.encode() in path.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["recovery.png"]
    with pytest.raises(ValueError, match=r"expected recovery\.png, recovery\.svg or recovery\.pdf"):
        plots.save(figure, tmp_path / "recovery.jpg")


@pytest.mark.parametrize(("kind", "begins"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_saved_as_svg_or_pdf_with_its_provenance(
    tmp_path: Path, kind: str, begins: bytes
) -> None:
    plots.save(
        plots.recoveries(statistics.summarize(build())), tmp_path / f"a.{kind}", {"provenance": "seven"}
    )
    written = (tmp_path / f"a.{kind}").read_bytes()
    assert written.startswith(begins)
    assert b"seven" in written


def test_a_figure_is_shown_by_a_notebook_without_pyplot() -> None:
    shown = plots.recoveries(statistics.summarize(build()))._repr_png_()
    assert shown.startswith(b"\x89PNG")


def test_figures_look_the_same_whatever_the_user_has_set() -> None:
    usual = plots.recoveries(statistics.summarize(build()))
    with mpl.rc_context({"axes.spines.top": True, "axes.titlesize": 20.0, "lines.linewidth": 9.0}):
        other = plots.recoveries(statistics.summarize(build()))
    for one in (usual, other):
        assert not one.axes[0].spines["top"].get_visible()
        assert one.axes[0].title.get_fontsize() == 9.5


def test_small_effects_are_written_in_a_power_of_ten_that_the_colour_bar_names() -> None:
    small = build()
    small["effect"] = (small["effect"] * 1e-5).assign_attrs(small["effect"].attrs)
    figure, usual = plots.heatmap(small), plots.heatmap(build())
    power = int(np.floor(np.log10(np.abs(np.asarray(figure.axes[0].images[0].get_array())).max())))
    assert figure.axes[1].get_ylabel() == f"effect (10⁻{'⁰¹²³⁴⁵⁶⁷⁸⁹'[-power]} logits)"
    assert not any("e-" in text for text in texts(figure))
    ratio = [float(a.replace("−", "-")) * 10.0**power for a in texts(figure)]
    full = [float(a.replace("−", "-")) * 1e-5 for a in texts(usual)]
    np.testing.assert_allclose(ratio, full, atol=6e-7)


def test_sites_without_coordinates_are_refused_with_what_would_do() -> None:
    plain = build().assign_coords(layer=("site", [-1] * 6), head=("site", [-1] * 6))
    with pytest.raises(ValueError, match=r"x='site', y='level' does, and plots\.recoveries"):
        plots.heatmap(plain)
    assert plots.heatmap(plain, x="site", y="level").axes[0].images
    with pytest.raises(ValueError, match=r"tell them apart, such as x='head', y='layer'"):
        plots.heatmap(build(), x="component")


def test_a_step_is_named_by_its_phase_where_the_run_is_known() -> None:
    config = StudyConfig().to_dict()
    dataset = over_steps((4500, 4510)).assign_attrs(provenance=json.dumps({"config": config}))
    title = plots.heatmap(dataset.sel(step=4510)).axes[0].get_title()
    assert "X2 step 10 (step 4510)" in title
    other = dataset.assign_attrs(provenance=json.dumps({"config": {"lr": 1}}))
    assert ", step 4510" in plots.heatmap(other.sel(step=4510)).axes[0].get_title()


def test_every_site_of_stored_and_fresh_is_named_also_where_points_are_crowded() -> None:
    summary = over_optimizers()
    tight = summary.assign(effect=0.5 + 1e-3 * summary["effect"])
    for dataset in (summary, tight):
        named = set(texts(plots.stored_and_fresh(dataset)))
        assert named == set(summary["site"].values.tolist())


@pytest.mark.parametrize(
    ("value", "largest", "text"),
    [
        (0.123, 1.2, "0.12"),
        (-0.001, 1.2, "0.00"),
        (-3.21, 45.0, "−3"),
        (-5.4e-8, 6e-8, "−5e-08"),
        (0.0, 0.0, "0"),
    ],
)
def test_numbers_in_cells_have_the_digits_that_the_largest_needs(
    value: float, largest: float, text: str
) -> None:
    assert number(value, largest) == text
