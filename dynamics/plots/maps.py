"""Maps: one coloured cell per site, by two of its coordinates or by the checkpoint."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.ticker import FuncFormatter

from dynamics.plots import figures
from dynamics.plots.figures import Figure, styled

_PAIRS = "training step, from → into"
_NUMBERED = 400  # cells; more are too small to hold a number


@styled
def heatmap(dataset: xr.Dataset, x: str = "head", y: str = "layer", value: str = "effect") -> Figure:
    """The mean over the units at every site, by two coordinates of the sites or two dims.

    The colours diverge from zero, as far to either side. Cells without a site or a number stay grey.

    Args:
        dataset: a raw result (summarised here; attributions are called effects then) or a summary.
        x, y: coordinates along `site`, `site` itself, or another dim such as `step`.
        value: a variable of the summary, such as effect or recovery.

    Returns:
        A figure titled with the number of units, its colour bar labelled with the units of `value`.

    Raises:
        ValueError: several values fall into one cell: a dim that is not selected, or sites alike in x and y.
    """
    if "effect_low" not in dataset:
        kept = {"site", x, y, "example", "seed"}
        named = "effect" if "effect" in dataset else "attribution"
        figures.expect_dims(dataset, named, tuple(str(name) for name in kept))
    summary = figures.expect_dims(figures.summary_of(dataset), value, ("site", x, y))
    for name in (x, y):
        if name not in summary.coords:
            raise ValueError(f"no coordinate '{name}'; expected two of {sorted(map(str, summary.coords))}")
    array, across, down = xr.broadcast(summary[value], summary[x], summary[y])
    columns, column = _places(across.values.ravel(), summary[x])
    rows, row = _places(down.values.ravel(), summary[y])
    cells = np.full((len(rows), len(columns)), np.nan)
    counts = np.zeros(cells.shape, dtype=np.int64)
    np.add.at(counts, (row, column), 1)
    if counts.max(initial=0) > 1:
        i, j = np.argwhere(counts > 1)[0]
        labels = xr.broadcast(summary["site"], array)[0].values.ravel()[(row == i) & (column == j)].tolist()
        raise ValueError(
            f"{len(labels)} values fall in the cell {x} {columns[j]}, {y} {rows[i]}: {labels[:6]}. "
            f"Select the sites that differ there, or choose coordinates that tell them apart{_apart(summary)}."
        )
    cells[row, column] = array.values.ravel()
    return _draw(cells, columns, rows, (x, y), summary, value)


@styled
def site_by_step(summary: xr.Dataset, value: str = "effect") -> Figure:
    """One row per site and one column per checkpoint, in the order of training.

    The columns are equally wide, whatever the number of steps between two checkpoints.

    Args:
        summary: with dims `site` and `step`, and no other of which several values are left.
        value: a variable of the summary.

    Raises:
        ValueError: no dim `step`, or another dim is not selected.
    """
    if "step" not in summary.dims:
        raise ValueError(f"the summary has dims {sorted(map(str, summary.dims))}; expected site and step")
    return heatmap(summary, x="step", y="site", value=value)


@styled
def transfer(summary: xr.Dataset, value: str = "effect") -> Figure:
    """One row per site and one column for each source checkpoint put into each base checkpoint: from → into.

    Columns stand by the checkpoint that they go into, then by the one that they come from.

    Args:
        summary: of a sweep over pairs, with dims `site`, `step` and `source_step`, and no other of which several
            values are left.
        value: a variable of the summary.

    Raises:
        ValueError: no dims `step` and `source_step`, or another dim is not selected.
    """
    if absent := {"step", "source_step"} - set(summary.dims):
        raise ValueError(
            f"the summary has dims {sorted(map(str, summary.dims))}; expected site, step and source_step, and "
            f"{sorted(absent)} is missing."
        )
    stacked = summary.stack({_PAIRS: ("step", "source_step")}, create_index=False)
    steps = zip(stacked["source_step"].values.tolist(), stacked["step"].values.tolist(), strict=True)
    labels = [f"{source} → {base}" for source, base in steps]
    return heatmap(stacked.assign_coords({_PAIRS: labels}), x=_PAIRS, y="site", value=value)


def _apart(summary: xr.Dataset) -> str:
    """Which two coordinates tell all sites apart, in words; every site by itself where no two do."""
    names = [str(name) for name, coord in summary.coords.items() if coord.dims == ("site",)]
    for x, y in combinations(sorted(set(names) - {"site"}), 2):
        pairs = set(zip(summary[x].values.tolist(), summary[y].values.tolist(), strict=True))
        if len(pairs) == summary.sizes["site"] and min(np.unique(summary[n]).size for n in (x, y)) > 1:
            return f", such as x={x!r}, y={y!r}"
    return (
        ": here no two of "
        f"{', '.join(sorted(set(names) - {'site'}))} do, but x='site', y='level' does, and "
        "plots.recoveries(statistics.summarize(dataset)) draws a row for each site"
    )


def _places(values: npt.NDArray[Any], coord: xr.DataArray) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The labels of one axis, and the place of every value on it: numbers ascend, words keep their order."""
    unique, first, place = np.unique(values, return_index=True, return_inverse=True)
    if coord.dtype.kind == "U":
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        return [str(label) or "none" for label in unique[order]], rank[place]
    missing = -1 if coord.name in ("layer", "head") else None
    return ["none" if label == missing else str(label) for label in unique], place


def _draw(
    cells: npt.NDArray[np.float64],
    columns: list[str],
    rows: list[str],
    names: tuple[str, str],
    summary: xr.Dataset,
    value: str,
) -> Figure:
    n_rows, n_columns = cells.shape
    known = np.abs(cells[np.isfinite(cells)])
    limit = float(known.max(initial=0.0)) or 1.0
    power = figures.power_of_ten(limit)
    texts = [
        [
            figures.number(cell / 10.0**power, limit / 10.0**power) if np.isfinite(cell) else ""
            for cell in line
        ]
        for line in cells
    ]
    numbered = cells.size <= _NUMBERED
    longest = max(len(text) for line in texts for text in line) if numbered else 2
    cell_width = min(max(0.085 * longest + 0.12, 0.42), 0.9) if numbered else 0.25
    cell_height = 0.3 if numbered else 0.2
    label_width = 0.075 * max(map(len, rows))
    figure, axes = figures.new(
        max(n_columns * cell_width + label_width + 1.9, 4.2), max(n_rows * cell_height + 1.3, 2.6)
    )
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#dddddd")
    image = axes.imshow(
        np.ma.masked_invalid(cells),
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="none",
    )
    if numbered:
        for i, j in np.argwhere(np.isfinite(cells)):
            dark = abs(cells[i, j]) > 0.6 * limit
            axes.text(
                j, i, texts[i][j], ha="center", va="center", fontsize=7.5, color="white" if dark else "black"
            )
    step = 1 if numbered else max(1, n_columns // 20)
    crowded = max(map(len, columns)) * 0.075 > 0.9 * cell_width * step
    axes.set_xticks(
        range(0, n_columns, step),
        columns[::step],
        rotation=45 if crowded else 0,
        ha="right" if crowded else "center",
    )
    axes.set_yticks(range(n_rows), rows)
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("training step" if names[0] == "step" else names[0])
    axes.set_ylabel("training step" if names[1] == "step" else names[1])
    figures.entitle(axes, _title(names, summary, value), summary)
    label = figures.with_power(figures.with_units(summary, value), power)
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)
    bar.formatter = FuncFormatter(lambda number, _: f"{number / 10.0**power:g}")
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _title(names: tuple[str, str], summary: xr.Dataset, value: str) -> str:
    """What is seen, such as `Mean effect by head and layer`."""
    words = {"step": "training step", "site": figures.kinds(summary)}
    along = [words.get(name, name) for name in names]
    if names[0] == _PAIRS:
        along[0] = "pair of checkpoints"
    return f"{'Mean effect' if value == 'effect' else value.capitalize()} by {along[1]} and {along[0]}"
