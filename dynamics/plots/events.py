"""What happened along training: curves with their change points, and maps under the accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from dynamics import statistics
from dynamics.plots import figures
from dynamics.plots.curves import OTHERS, SETS
from dynamics.plots.figures import Figure, styled

Figures = Mapping[str, Figure]
"""Figures by name."""

Panel = tuple[xr.Dataset, Mapping[str, xr.Dataset]]
"""Curves, one variable each, and by name the events marked in them, from `comparison.when`."""


@styled
def event_curves(columns: Mapping[str, Sequence[Panel]]) -> Figure:
    """Curves over training, panels below each other, with a line and its interval where each event happened.

    With a dim `seed` a curve is the mean over runs with its 95 % t interval. Steps are on a logarithmic axis that
    begins linearly, so that a phase's first step, 0, has its place.

    Args:
        columns: title -> panels from the top down, as many in every column; steps counted from where the column
            begins. A panel's curves are [(seed,) step]; its label is its Dataset's attribute `long_name`.
            Variables named as the four sets have their colours. Of an event `mean`, `low` and `high` are drawn,
            of one without seeds `at`.

    Raises:
        ValueError: columns differ in their number of panels, or a curve has other dims.
    """
    sizes = {len(panels) for panels in columns.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"the columns have {sorted(sizes)} panels; expected as many in each, at least one")
    (n_rows,) = sizes
    figure = Figure(figsize=(4.6 * len(columns) + 0.6, 2.2 * n_rows + 0.9))
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, (title, panels) in zip(parts, columns.items(), strict=True):
        part.suptitle(title, fontsize=10)
        rows = part.subplots(n_rows, 1, squeeze=False, sharex=True)[:, 0]
        for axes, (curves, marks) in zip(rows, panels, strict=True):
            _panel(axes, curves, marks)
        rows[-1].set_xlabel("training step")
    return figure


def _panel(axes: Axes, curves: xr.Dataset, marks: Mapping[str, xr.Dataset]) -> None:
    others = iter(OTHERS * max(1, len(curves.data_vars)))
    for name, curve in curves.data_vars.items():
        if set(curve.dims) - {"seed", "step"} or "step" not in curve.dims:
            raise ValueError(f"the curve {name!r} has dims {curve.dims}; expected step, and seed at most")
        label, color, line = SETS[str(name)] if name in SETS else (str(name), next(others), "-")
        across = curve["step"].values
        if "seed" in curve.dims:
            mean, low, high = statistics.mean_interval(curve.transpose("step", "seed").values)
            axes.fill_between(across, low, high, color=color, alpha=0.18, linewidth=0)
        else:
            mean = curve.values
        axes.plot(across, mean, label=label, color=color, linestyle=line, linewidth=1.5)
    for (name, mark), style in zip(marks.items(), ("-", ":", "-.", "--") * len(marks), strict=False):
        at = float(mark["mean"] if "mean" in mark else mark["at"])
        if np.isfinite(at):
            axes.axvline(at, color=figures.BLACK, linestyle=style, linewidth=1.0, label=name)
        if "low" in mark and np.isfinite(float(mark["low"])):
            first, end = max(0.0, float(mark["low"])), float(mark["high"])
            axes.axvspan(first, end, color=figures.GREY, alpha=0.15, linewidth=0)
    last = float(max(curve["step"].values.max() for curve in curves.data_vars.values()))
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
    axes.set_xlim(0, last)
    ticks = [0.0, *(10.0**n for n in range(int(np.log10(last)) + 1))]
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.axhline(0, color=figures.GREY, linewidth=0.6, zorder=1)
    axes.set_ylabel(curves.attrs.get("long_name", ""), fontsize=9)
    axes.tick_params(labelsize=8)
    is_share = str(curves.attrs.get("long_name", "")).startswith(("accuracy", "attention"))
    if is_share and all(float(curve.min()) >= 0 for curve in curves.data_vars.values()):
        axes.set_ylim(0.0, 1.0)  # an interval may reach beyond, a share cannot; a difference may
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)


@styled
def map_under_accuracies(dataset: xr.Dataset, value: str, scores: xr.Dataset) -> Figure:
    """One row per site and one column per checkpoint, with the sets' accuracies at the same checkpoints above.

    The columns are equally wide, whatever the number of steps between two checkpoints. Values of both signs diverge
    from white; of one sign they run from white to dark, logarithmically where they span more than two decades.

    Args:
        dataset: `value` [site, step].
        value: a variable of it.
        scores: `accuracy` [example, step], one example for each set, as `comparison.score` and `over_training`
            make it; a step of `dataset` that it lacks is an error.

    Raises:
        ValueError: another dim is left, or steps are missing from the scores.
    """
    chosen = figures.expect_dims(dataset, value, ("site", "step"))
    steps, sites = chosen["step"].values, [str(site) for site in chosen["site"].values]
    if missing := sorted(set(steps.tolist()) - set(scores["step"].values.tolist())):
        raise ValueError(f"the scores lack steps {missing[:6]}; expected one for every step of '{value}'")
    cells = chosen[value].transpose("site", "step").values
    known = cells[np.isfinite(cells)]
    height = max(0.2 * len(sites), 1.2)
    label_width = 0.075 * max(map(len, sites))
    figure = Figure(
        figsize=(min(max(0.11 * len(steps), 4.6), 11.0) + label_width + 1.2, height + 3.0),
    )
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, height))
    others = iter(OTHERS * max(1, scores.sizes["example"]))
    for name in map(str, scores["example"].values):
        label, color, line = SETS[name] if name in SETS else (name, next(others), "-")
        values = scores["accuracy"].sel(example=name, step=steps).values
        above.plot(np.arange(len(steps)), values, label=label, color=color, linestyle=line, linewidth=1.4)
    above.set(ylabel="accuracy", ylim=(0.0, 1.0))
    figure.legend(loc="outside upper center", ncols=2, fontsize=7.5)
    below.set_facecolor("#dddddd")
    image = below.imshow(
        np.ma.masked_invalid(cells),
        cmap="RdBu_r" if (known < 0).any() else "Blues",
        norm=_norm(known),
        aspect="auto",
        interpolation="none",
    )
    below.spines[:].set_visible(False)
    below.tick_params(length=0, labelsize=8)
    below.set_yticks(range(len(sites)), sites)
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 12)).round().astype(int))
    below.set_xticks(shown, [str(steps[i]) for i in shown], rotation=45, ha="right")
    below.set_xlabel("training step")
    words = fill(chosen[value].attrs.get("long_name", value), max(12, int(12 * height)))
    bar = figure.colorbar(image, ax=below, label=words, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _norm(known: npt.NDArray[np.float64]) -> Normalize:
    """How finite values become colours."""
    limit = float(np.abs(known).max(initial=0.0)) or 1.0
    if (known < 0).any():
        return Normalize(-limit, limit)
    low = float(np.quantile(known[known > 0], 0.05)) if (known > 0).any() else limit
    return LogNorm(low, limit, clip=True) if limit > 100 * low else Normalize(0.0, limit)


@styled
def moved(weights: xr.Dataset, logits: xr.Dataset, most: int = 24) -> Figure:
    """Two checkpoints: the sites that moved most, and how far the answers about each example did.

    Args:
        weights: from `comparison.compare_weights`.
        logits: from `comparison.compare_logits`, with a coordinate `set` where examples are of several.
        most: at most so many sites and examples.
    """
    relative = weights["relative"].sortby(weights["relative"], ascending=False)[:most]
    kl = logits["kl"].sortby(logits["kl"], ascending=False)[:most]
    rows = max(relative.size, kl.size)
    figure = Figure(figsize=(10.0, 0.2 * rows + 1.6))
    left, right = figure.subplots(1, 2)
    left.set_title(f"The {figures.kinds(weights)}s that moved most".replace("matrixs", "matrices"))
    right.set_title("The answers that changed most")
    sets = [str(s) for s in kl["set"].values] if "set" in kl.coords else [""] * kl.size
    sides: list[tuple[Axes, xr.DataArray, list[str], list[str], str]] = [
        (
            left,
            relative,
            [str(s) for s in relative["site"].values],
            [figures.BLUE] * relative.size,
            "relative",
        ),
        (
            right,
            kl,
            [str(s) for s in kl["example"].values],
            [SETS[s][1] if s in SETS else figures.BLUE for s in sets],
            "kl",
        ),
    ]
    for axes, values, labels, colors, _ in sides:
        places = np.arange(values.size)
        axes.barh(places, values.values, color=colors, height=0.7)
        axes.set_yticks(places, labels)
        axes.set_ylim(values.size - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelsize=8)
        units = values.attrs.get("units", "1")
        axes.set_xlabel(values.attrs["long_name"] + ("" if units == "1" else f" ({units})"), fontsize=9)
    for name in dict.fromkeys(s for s in sets if s in SETS):
        right.barh([np.nan], [0], color=SETS[name][1], label=SETS[name][0])
    if right.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower right", ncols=2, fontsize=7.5)
    return figure
