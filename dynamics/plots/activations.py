"""Figures of exchanged activations: tiles by layer and position, bars on a log axis, attention by signed head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from dynamics import statistics
from dynamics.plots import figures
from dynamics.plots.figures import Figure, styled

Array = npt.NDArray[np.float64]

_SIGNED = ("effect", "attribution")
"""Variables whose colours diverge from zero."""


@styled
def tiles(
    dataset: xr.Dataset,
    value: str = "effect",
    facet: str = "measure",
    x: str = "pos",
    x_labels: Sequence[str] = (),
) -> Figure:
    """One tile for each layer's component and position, one panel for each value of a dim, one colour scale.

    Rows are components in the order of their layers, the first on top. The mean over examples is shown.

    Args:
        dataset: a raw result whose sites have a position, such as `interchange` gives.
        value: "effect" and "attribution" diverge from zero in colour, "patched" does not.
        facet: what panels are for: a dim such as "measure" (tokens, letters) or "step", or a coordinate of the
            examples; one panel where there is none.
        x: the coordinate of the sites along the columns.
        x_labels: words in place of 0, 1, 2, ...: the prompt's tokens.

    Raises:
        ValueError: several sites fall into one tile, or another dim is not selected.
    """
    panels = _panels(dataset, value, facet)
    rows, columns, cells = _tiles(panels, x)
    names = _ticks(columns, x_labels)
    figure = Figure(
        figsize=(
            len(cells) * (0.34 * len(columns) + 0.6) + 1.1 + 0.075 * max(map(len, rows)),
            0.2 * len(rows) + 1.5,
        ),
    )
    grid = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    settings = _colours(np.stack(list(cells.values())), value)
    for axes, (name, values) in zip(grid, cells.items(), strict=True):
        image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="none", **settings)
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(columns)), names, rotation=90 if x_labels else 0, fontsize=7)
        axes.set_xlabel("position" if x == "pos" else x, fontsize=8)
        axes.set_facecolor("#dddddd")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    grid[0].set_yticks(range(len(rows)), rows, fontsize=7)
    _colour_bar(figure, image, list(grid), figures.with_units(dataset, value))
    figure.suptitle(f"{value.capitalize()} by component and position, {_mean_over(panels)}")
    return figure


@styled
def bars(dataset: xr.Dataset, value: str = "patched", facet: str = "measure") -> Figure:
    """One bar for each layer's component on a logarithmic axis, in one panel for each value of a dim.

    Args:
        dataset: a raw result with one site for each layer and component: one position is selected first, as in
            `found.isel(site=found["pos"] == 4)`. Dashed lines show `base` and `source`.
        value: a variable that is above zero throughout, such as a probability.
        facet: as `tiles`.

    Raises:
        ValueError: a value is not above zero; several sites of one layer and component.
    """
    panels = _panels(dataset, value, facet)
    rows, _, cells = _tiles(panels.assign_coords(_all=("site", np.zeros(panels.sizes["site"]))), "_all")
    if not all((values > 0).all() for values in cells.values()):
        raise ValueError(f"'{value}' is not above zero everywhere; a logarithmic axis shows probabilities.")
    references = {
        name: _panels(dataset, name, facet)
        for name in ("base", "source")
        if name in dataset and value == "patched"
    }
    figure = Figure(figsize=(max(0.22 * len(rows) + 1.2, 4.0), 1.7 * len(cells) + 0.9))
    grid = figure.subplots(len(cells), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    colours = [figures.BLUE, figures.ORANGE, figures.GREEN, figures.PURPLE, figures.VERMILLION, figures.SKY]
    for i, (axes, (name, values)) in enumerate(zip(grid, cells.items(), strict=True)):
        axes.bar(range(len(rows)), values[:, 0], color=colours[i % len(colours)], width=0.8)
        axes.set_yscale("log")
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(name, fontsize=9)
        for reference, style in zip(references, ("--", ":"), strict=False):
            level = float(
                references[reference].isel({facet: i} if facet in references[reference].dims else {})
            )
            axes.axhline(level, color=figures.BLACK, linestyle=style, linewidth=0.8, label=reference)
    if references:
        figure.legend(*grid[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    grid[-1].set_xticks(range(len(rows)), rows, rotation=90, fontsize=7)
    figure.supylabel(figures.with_units(dataset, value), fontsize=9)
    figure.suptitle(f"{value.capitalize()} by component, {_mean_over(panels)}")
    return figure


@styled
def signed_heads(dataset: xr.Dataset, tokens: Sequence[str], n: int = 6) -> Figure:
    """Attention by head and sign: what each attention weight, destination by source, adds to the measure or takes.

    Every head is taken apart into its positive and its negative weights; the n parts with the largest sums are
    shown, largest first, in one colour scale.

    Args:
        dataset: attributions of patterns by ("layer", "head", "pos", "src"), such as
            `attribute_activations(..., values="zero")`, whose negative is attention attribution. One measure; the
            mean over examples is shown, so select one for a single prompt.
        tokens: the prompt's, one for each position.
        n: parts shown.
    """
    array = _panels(dataset, "attribution", "")
    layers, heads = array["layer"].values, array["head"].values
    n_pos = int(array["pos"].values.max()) + 1
    if len(tokens) != n_pos:
        raise ValueError(f"found {len(tokens)} tokens for {n_pos} positions; expected one each")
    parts: dict[str, Array] = {}
    for layer, head in dict.fromkeys(zip(layers.tolist(), heads.tolist(), strict=True)):
        chosen = array.isel(site=(layers == layer) & (heads == head))
        whole = np.zeros((n_pos, n_pos))
        whole[chosen["pos"].values, chosen["src"].values] = chosen.values
        for sign, part in (("+", np.maximum(whole, 0.0)), ("−", np.minimum(whole, 0.0))):
            parts[f"L{layer}H{head}{sign}"] = part
    largest = sorted(parts, key=lambda name: -abs(parts[name].sum()))[:n]
    n_columns = min(3, len(largest))
    n_rows = -(-len(largest) // n_columns)
    side = 0.17 * n_pos + 1.0
    figure = Figure(figsize=(n_columns * side + 1.0, n_rows * (side + 0.2)))
    grid: Any = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    settings = _colours(np.stack([parts[name] for name in largest]), "attribution")
    for axes, name in zip(grid, largest, strict=False):
        image = axes.imshow(parts[name], interpolation="none", **settings)
        axes.set_title(f"{name}   Σ {parts[name].sum():+.2g}", fontsize=8)
        axes.set_xticks(range(n_pos), tokens, rotation=90, fontsize=6)
        axes.set_yticks(range(n_pos), tokens, fontsize=6)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for axes in grid[len(largest) :]:
        axes.set_axis_off()
    figure.suptitle("What attention weights add to the measure or take from it, by head and sign")
    figure.supxlabel("attended to", fontsize=8)
    figure.supylabel("attending", fontsize=8)
    _colour_bar(figure, image, list(grid), figures.with_units(dataset, "attribution"), shrink=0.7)
    return figure


@styled
def attribution_against_patching(attribution: xr.Dataset, patched: xr.Dataset) -> Figure:
    """One point for each site: its attribution across, the effect of patching it up, means over examples.

    Args:
        attribution, patched: from `attribute_activations` and `patch_activations`, with the same sites and one
            measure each. Their rank correlation is in the title; on the dashed line they are equal.
    """
    across, up = _panels(attribution, "attribution", ""), _panels(patched, "effect", "")
    rho = statistics.rank_correlation(attribution, patched)["of_means"].squeeze()
    figure, axes = figures.new(5.2, 4.6)
    colours = [figures.BLUE, figures.ORANGE, figures.GREEN, figures.PURPLE, figures.VERMILLION, figures.SKY]
    components = list(dict.fromkeys(across["component"].values.tolist()))
    for i, component in enumerate(components):
        here = across["component"].values == component
        marks: dict[str, Any] = {"s": 14, "color": colours[i % len(colours)], "alpha": 0.7, "linewidths": 0}
        axes.scatter(across.values[here], up.values[here], label=component, **marks)
    ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
    axes.plot(ends, ends, linestyle="--", color=figures.BLACK, linewidth=0.8, zorder=0)
    axes.set_xlabel(figures.with_units(attribution, "attribution"))
    axes.set_ylabel(figures.with_units(patched, "effect"))
    axes.set_title(
        f"{across.sizes['site']} sites, {_mean_over(across)}: Spearman ρ = {float(rho):.2f}",
        fontsize=9,
    )
    if len(components) > 1:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _panels(dataset: xr.Dataset, value: str, facet: str) -> xr.DataArray:
    """A variable's mean over examples, [facet, site] at most; the number of examples among its attributes."""
    chosen = figures.expect_dims(dataset, value, ("site", "example", "seed", facet))
    over = [dim for dim in ("example", "seed") if dim in chosen[value].dims]
    if facet in chosen.coords and chosen[facet].dims == ("example",):
        counts = np.unique(chosen[facet].values, return_counts=True)[1]
        shown = " to ".join(map(str, sorted({int(counts.min()), int(counts.max())})))
        return chosen[value].groupby(facet).mean(over).transpose(facet, ...).assign_attrs(n=shown)
    n = int(np.prod([chosen.sizes[dim] for dim in over], dtype=int))
    return chosen[value].mean(over).assign_attrs(n=n)


def _mean_over(panels: xr.DataArray) -> str:
    n = panels.attrs["n"]
    return "one example" if n in (1, "1") else f"mean over {n} examples"


def _tiles(panels: xr.DataArray, x: str) -> tuple[list[str], list[int], dict[str, Array]]:
    """Rows by component and layer, columns by a coordinate, and the cells of each panel."""
    if x not in panels.coords:
        raise ValueError(
            f"the sites have no coordinate '{x}'; cut them by it: sites.activations(..., by=(...))."
        )
    places = list(zip(panels["layer"].values.tolist(), panels["component"].values.tolist(), strict=True))
    order = sorted(dict.fromkeys(places), key=lambda place: place[0])
    columns = sorted(set(panels[x].values.tolist()))
    rows = [f"{component} {layer}" if layer >= 0 else component for layer, component in order]
    facets = [str(name) for name in panels.dims if name != "site"]
    cells: dict[str, Array] = {}
    for i in range(panels.sizes[facets[0]] if facets else 1):
        one = panels.isel({facets[0]: i}) if facets else panels
        grid = np.full((len(rows), len(columns)), np.nan)
        for place, column, number in zip(places, one[x].values.tolist(), one.values, strict=True):
            cell = order.index(place), columns.index(column)
            if not np.isnan(grid[cell]):
                raise ValueError(
                    f"several sites are {rows[cell[0]]} at {x} {column}; select one, or sites without heads."
                )
            grid[cell] = number
        cells[_title(one[facets[0]]) if facets else ""] = grid
    return rows, columns, cells


def _title(facet: xr.DataArray) -> str:
    """A word as it is, a number with what it numbers."""
    return str(facet.item()) if facet.dtype.kind == "U" else f"{facet.name} {facet.item()}"


def _ticks(columns: Sequence[int], labels: Sequence[str]) -> list[str]:
    if labels and len(labels) <= max(columns):
        raise ValueError(f"found {len(labels)} labels for positions up to {max(columns)}; expected one each")
    return [labels[i] if labels else str(i) for i in columns]


def _colour_bar(figure: Figure, image: Any, grid: list[Any], label: str, shrink: float = 1.0) -> None:
    """One bar for all panels."""
    bar = figure.colorbar(image, ax=grid, shrink=shrink, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _colours(values: Array, value: str) -> dict[str, Any]:
    """Colour map and limits, shared by all panels."""
    if value in _SIGNED:
        limit = float(np.nanmax(np.abs(values))) or 1.0
        return {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    return {"cmap": "viridis", "vmin": float(np.nanmin(values)), "vmax": float(np.nanmax(values))}
