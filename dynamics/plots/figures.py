"""What all figures share: colours, words, a fresh Figure, and a file."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import results, statistics
from dynamics.results.files import replacing

# Okabe & Ito 2008: distinguishable with any common colour vision.
BLACK, GREY = "#000000", "#888888"
ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILLION, PURPLE = "#D55E00", "#CC79A7"


def save(figure: Figure, path: str | os.PathLike[str], provenance: Mapping[str, str] | None = None) -> None:
    """Write a figure as PNG at 150 dpi, with its provenance in the PNG's text metadata.

    A figure can be made again from its dataset, so an older file of that name is replaced, whole or not at
    all. Its folder is made if absent.

    Args:
        figure: any figure; drawn without pyplot.
        path: ends in .png.
        provenance: keyword -> text, such as {"provenance": dataset.attrs["provenance"]}.

    Raises:
        ValueError: the name does not end in .png.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(
            f"found the name {target.name}; figures are saved as PNG, expected {target.stem}.png"
        )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150, metadata=dict(provenance or {}))
    with replacing(target) as temporary:
        temporary.write_bytes(image.getvalue())


def new(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own, in inches, with one pair of axes and no pyplot state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def summary_of(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset itself where it is a summary already; a raw result is summarised by `statistics`."""
    if "effect_low" in dataset:
        return dataset
    return statistics.summarize(dataset)


def expect_dims(dataset: xr.Dataset, value: str, dims: tuple[str, ...]) -> xr.Dataset:
    """The dataset without dims of length one; `value` must have no dims but these.

    Raises:
        ValueError: no such variable; a dim is left over, with advice on selecting it.
    """
    if value not in dataset:
        found = sorted(map(str, dataset.data_vars))
        raise ValueError(f"the dataset has no '{value}'; expected one of {found}")
    chosen = dataset.squeeze([name for name in dataset.dims if dataset.sizes[name] == 1 and name not in dims])
    if left := [str(name) for name in chosen[value].dims if name not in dims]:
        example = chosen[left[0]].values[0] if left[0] in chosen.coords else 0
        raise ValueError(
            f"'{value}' has several values for {left}; expected dims {list(dims)}. "
            f"Select one first, as in .sel({left[0]}={example!r})."
        )
    return chosen


def with_units(dataset: xr.Dataset, name: str) -> str:
    """A label such as `effect (logits)`; without brackets where there are no units."""
    units = results.units(dataset, name)
    return name if units in ("", "1") else f"{name} ({units})"


def described(dataset: xr.Dataset) -> str:
    """How many units, and what is selected: `n = 30 (unit: example, in this run), step 4010`."""
    counts = dataset["n"].values
    words = [
        f"n = {counts.min()}" if counts.min() == counts.max() else f"n = {counts.min()} to {counts.max()}"
    ]
    if "unit" in dataset.attrs:
        words[0] += f" (unit: {dataset.attrs['unit']})"
    for name in ("measure", "step", "source_step", "seed", "optimizer"):
        if name in dataset.coords and dataset[name].ndim == 0:
            value = dataset[name].item()
            words.append(
                f"{value} optimizer state" if name == "optimizer" else f"{name.replace('_', ' ')} {value}"
            )
    return ", ".join(words)


def entitle(axes: Axes, first: str, dataset: xr.Dataset) -> None:
    """A title over the axes: its first line, then what the dataset holds, broken to the figure's width."""
    figure = axes.get_figure(root=True)
    width = int(12 * (figure.get_figwidth() if figure else 8))
    axes.set_title("\n".join([first, *textwrap.wrap(described(dataset), width)]), fontsize=9)


def number(value: float, largest: float) -> str:
    """A short number beside others: two digits of a number a third as large as the largest of them."""
    if not np.isfinite(largest) or largest == 0:
        return "0"
    decimals = 1 - int(np.floor(np.log10(largest / 3)))
    text = f"{value:.{max(decimals, 0)}f}" if -3 <= decimals <= 4 else f"{value:.0e}"
    return text.lstrip("-") if float(text) == 0 else ("−" + text[1:] if value < 0 else text)
