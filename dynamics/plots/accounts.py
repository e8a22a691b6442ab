"""Accounts of training: what was written into a measure, stacked over steps, and by site and source."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes

from dynamics.plots import figures
from dynamics.plots.figures import Figure, styled

COLOURS = (
    figures.BLUE,
    figures.VERMILLION,
    figures.SKY,
    figures.ORANGE,
    figures.GREEN,
    figures.PURPLE,
    "#F0E442",
)
"""Of the parts that are told apart; the rest is grey."""

OTHERS = "all others"


@styled
def account(dataset: xr.Dataset) -> Figure:
    """The measure along a stretch of training, over what its account adds up from: by source, and by site.

    What raised the measure since the beginning is stacked above zero, what lowered it below; the black line is the
    measure less its beginning, which is their sum but for the residual. The parts that wrote most are told apart.

    Args:
        dataset: of `attribute_training`, with one example and one measure selected, such as
            `results.difference(account, "Dt3", "Df4")`.

    Raises:
        ValueError: a dim is not selected.
    """
    chosen = figures.expect_dims(dataset, "attribution", ("step", "source", "site"))
    kinds = [dim for dim in ("source", "site") if dim in chosen["attribution"].dims]
    figure = Figure(figsize=(5.2 * len(kinds) + 0.6, 4.4))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for kind, axes in zip(kinds, panels, strict=True):
        rest = [dim for dim in kinds if dim != kind]
        _stack(axes, chosen["attribution"].sum(rest).cumsum("step"), kind)
        risen = chosen["value"] - chosen["value"].isel(step=0)
        axes.plot(chosen["step"], risen, color=figures.BLACK, linewidth=1.8, label="the measure's change")
        axes.axhline(0, color=figures.GREY, linewidth=0.8, zorder=1)
        axes.set(xlabel="training step", title=f"What was written, by {kind}")
        axes.margins(x=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, reverse=True)
    panels[0].set_ylabel(_what(chosen))
    return figure


@styled
def account_map(dataset: xr.Dataset) -> Figure:
    """What each source wrote at each site over the whole stretch, with the sums at the margins.

    Args:
        dataset: of `attribute_training` with sources, one example and one measure selected.

    Raises:
        ValueError: a dim is not selected, or there are no sources.
    """
    chosen = figures.expect_dims(dataset, "attribution", ("step", "source", "site"))
    if "source" not in chosen.dims:
        raise ValueError(
            f"the account has dims {sorted(map(str, chosen.dims))}; a map takes one by source. Give "
            "attribute_training sources=."
        )
    cells = chosen["attribution"].sum("step").transpose("site", "source").values
    whole = np.zeros((cells.shape[0] + 1, cells.shape[1] + 1))
    whole[:-1, :-1], whole[-1, :-1], whole[:-1, -1], whole[-1, -1] = (
        cells,
        cells.sum(0),
        cells.sum(1),
        cells.sum(),
    )
    rows = [*map(str, chosen["site"].values), "all sites"]
    columns = [*map(str, chosen["source"].values), "all sources"]
    figure, axes = figures.new(0.72 * len(columns) + 2.6, 0.27 * len(rows) + 2.3)
    inner = float(np.abs(cells).max()) or 1.0
    image = axes.imshow(whole, cmap="RdBu_r", vmin=-inner, vmax=inner, aspect="auto", interpolation="none")
    largest = float(np.abs(whole).max())
    for (i, j), value in np.ndenumerate(whole):
        margin = i == len(rows) - 1 or j == len(columns) - 1
        axes.text(
            j,
            i,
            figures.number(value, largest),
            ha="center",
            va="center",
            fontsize=7.5,
            fontweight="bold" if margin else "normal",
            color="white" if abs(value) > 0.6 * inner else "black",
        )
    axes.axhline(len(rows) - 1.5, color=figures.BLACK, linewidth=1)
    axes.axvline(len(columns) - 1.5, color=figures.BLACK, linewidth=1)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    first, last = chosen["step"].values[[0, -1]]
    axes.set_title(f"What each source wrote at each {figures.kinds(chosen)}, steps {first} to {last}")
    bar = figure.colorbar(image, ax=axes, label=_what(chosen), fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _stack(axes: Axes, written: xr.DataArray, kind: str) -> None:
    """Running sums stacked from zero, to either side, those that wrote most first."""
    labels = [str(label) for label in written[kind].values]
    values: npt.NDArray[Any] = written.transpose(kind, "step").values
    order = np.argsort(-np.abs(values).max(-1))
    told, rest = order[: len(COLOURS)], order[len(COLOURS) :]
    parts = [(labels[i], values[i], colour) for i, colour in zip(told, COLOURS, strict=False)]
    if len(rest):
        parts.append((OTHERS, values[rest].sum(0), figures.GREY))
    above, below = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for label, part, colour in parts:
        up, down = np.clip(part, 0, None), np.clip(part, None, 0)
        steps = written["step"].values
        axes.fill_between(steps, above, above + up, color=colour, linewidth=0, label=label, alpha=0.85)
        axes.fill_between(steps, below + down, below, color=colour, linewidth=0, alpha=0.85)
        above, below = above + up, below + down


def _what(dataset: xr.Dataset) -> str:
    """What is drawn: `change of correct_logit, Dt3 − Df4 (logit)`."""
    words = [str(dataset[name].item()) for name in ("measure", "example") if name in dataset.coords]
    named = f"change of {', '.join(words)}" if words else "change of the measure"
    units = dataset["attribution"].attrs.get("units") or (
        str(dataset["units"].item()) if "units" in dataset.coords and dataset["units"].ndim == 0 else ""
    )
    return f"{named} ({units})" if units not in ("", "1") else named
