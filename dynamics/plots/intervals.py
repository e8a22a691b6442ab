"""Estimates with their intervals: sites side by side, and fresh against stored optimizer state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from dynamics.plots import figures
from dynamics.plots.figures import Figure, styled

_LABELLED = 16  # sites named in a scatter: those farthest from the origin
_OFFSETS = [  # of a name from its point, in points: the places it is tried at, in this order
    (5, 5, "left", "bottom"),
    (-5, 5, "right", "bottom"),
    (5, -5, "left", "top"),
    (-5, -5, "right", "top"),
    (8, 14, "left", "bottom"),
    (-8, 14, "right", "bottom"),
    (8, -14, "left", "top"),
    (-8, -14, "right", "top"),
    *(
        (far * dx, far * dy, "left" if dx > 0 else "right", "center")
        for far in (24, 40, 60, 84, 110)
        for dx, dy in (
            (1, 0),
            (-1, 0),
            (0.8, 0.8),
            (-0.8, 0.8),
            (0.8, -0.8),
            (-0.8, -0.8),
            (0.4, 1),
            (0.4, -1),
        )
    ),
]
_LED = 16  # points beyond which a thin line leads from a name to its point


@styled
def recoveries(summary: xr.Dataset) -> Figure:
    """Every site's recovery with its interval, in the summary's order, with lines at 0 and 1.

    Where no site has a recovery, since the gap is not distinguishable from zero, the effects are shown
    in the measure's units instead, and the axis says so.

    Args:
        summary: from `statistics.summarize`, every dim but `site` selected.
    """
    chosen = figures.expect_dims(summary, "recovery", ("site",))
    shown = bool(np.isfinite(chosen["recovery"].values).any())
    value = "recovery" if shown else "effect"
    label = (
        "recovery" if shown else f"{figures.with_units(chosen, 'effect')}; no recovery: the gap may be zero"
    )
    sites = [str(site) for site in chosen["site"].values]
    figure, axes = figures.new(6.0 + 0.06 * max(map(len, sites)), max(0.24 * len(sites) + 1.1, 2.2))
    places = np.arange(len(sites))
    for line in (0.0, 1.0) if shown else (0.0,):
        axes.axvline(line, color=figures.GREY, linewidth=0.8, zorder=1)
    estimate = chosen[value].values
    axes.errorbar(
        estimate,
        places,
        xerr=_arms(chosen, value),
        fmt="o",
        color=figures.BLUE,
        markersize=4,
        elinewidth=1.2,
        zorder=2,
    )
    axes.set_yticks(places, sites)
    axes.set_ylim(len(sites) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xlabel(label)
    figures.entitle(axes, f"{value.capitalize()} by {figures.kinds(chosen)}, {_percent(summary)}", chosen)
    return figure


@styled
def stored_and_fresh(summary: xr.Dataset, value: str = "effect") -> Figure:
    """Each site's value under the run's own optimizer state and under a fresh one, with both intervals.

    Sites on the dashed line do not depend on the moments. The sites farthest from the origin are named, up
    to sixteen.

    Args:
        summary: with `optimizer` values "stored" and "fresh", every other dim but `site` selected.
        value: `effect` or `recovery`.

    Raises:
        ValueError: an optimizer value is missing, or another dim is not selected.
    """
    if not {"stored", "fresh"} <= set(np.atleast_1d(summary.coords.get("optimizer", np.array([]))).tolist()):
        raise ValueError("the summary lacks the optimizer values 'stored' and 'fresh'; expected both")
    chosen = figures.expect_dims(summary, value, ("site", "optimizer"))
    stored, fresh = chosen.sel(optimizer="stored"), chosen.sel(optimizer="fresh")
    across, up = stored[value].values, fresh[value].values
    figure, axes = figures.new(5.6, 5.4)
    axes.axhline(0, color=figures.GREY, linewidth=0.6, zorder=1)
    axes.axvline(0, color=figures.GREY, linewidth=0.6, zorder=1)
    axes.errorbar(
        across,
        up,
        xerr=_arms(stored, value),
        yerr=_arms(fresh, value),
        fmt="o",
        color=figures.BLUE,
        ecolor=figures.SKY,
        markersize=4,
        elinewidth=0.8,
        zorder=2,
    )
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.plot([low, high], [low, high], linestyle="--", color=figures.BLACK, linewidth=0.8, zorder=1)
    label = figures.with_units(chosen, value)
    axes.set_xlabel(f"{label}, stored optimizer state")
    axes.set_ylabel(f"{label}, fresh optimizer state")
    figures.entitle(
        axes,
        f"{value.capitalize()} by {figures.kinds(chosen)} in stored and fresh optimizer state, {_percent(summary)}",
        chosen,
    )
    distance = np.nan_to_num(np.hypot(across, up), nan=-1.0)
    named = [int(i) for i in np.argsort(-distance)[:_LABELLED] if distance[i] >= 0]
    _name_points(
        figure, axes, np.column_stack([across, up]), {i: str(chosen["site"].values[i]) for i in named}
    )
    return figure


def _arms(dataset: xr.Dataset, value: str) -> npt.NDArray[np.float64]:
    """Lengths of the error bars, [2, n_sites]; none where there is no interval."""
    estimate = dataset[value].values
    arms = np.stack([estimate - dataset[f"{value}_low"].values, dataset[f"{value}_high"].values - estimate])
    return np.where(np.isnan(arms), 0.0, np.maximum(arms, 0.0))


def _percent(summary: xr.Dataset) -> str:
    return f"{100 * float(summary.attrs.get('confidence', 0.95)):g} % intervals"


def _name_points(figure: Figure, axes: Axes, points: npt.NDArray[np.float64], names: dict[int, str]) -> None:
    """Write each name beside its point, where it covers no other point or name; leave it out otherwise."""
    figure.draw_without_rendering()
    halo = [withStroke(linewidth=2.5, foreground="white")]
    inside = axes.get_window_extent()
    half = 3 * figure.dpi / 72  # of a point's mark, in pixels
    centres = axes.transData.transform(points[np.isfinite(points).all(1)])
    taken = [Bbox([(x - half, y - half), (x + half, y + half)]) for x, y in centres]
    for i, name in names.items():
        for dx, dy, ha, va in _OFFSETS:
            text = axes.annotate(
                name,
                (float(points[i, 0]), float(points[i, 1])),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8,
                path_effects=halo,
            )
            box = text.get_window_extent()
            covers = any(box.overlaps(other) for other in taken)
            if not covers and all(inside.contains(x, y) for x, y in (box.min, box.max)):
                taken.append(box)
                if np.hypot(dx, dy) > _LED:
                    centre = axes.transData.transform(points[i])
                    end = axes.transData.inverted().transform(centre + np.array([dx, dy]) * figure.dpi / 72)
                    axes.plot(*zip(points[i], end, strict=True), color=figures.GREY, linewidth=0.6, zorder=1)
                break
            text.remove()
