"""Curves over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from dynamics.plots import figures
from dynamics.plots.figures import Figure, styled

if TYPE_CHECKING:
    import pandas as pd

SETS = {
    "DtQ1": ("reliable, with questions (DtQ1)", figures.SKY, "--"),
    "Dt3": ("reliable, defined only (Dt3)", figures.BLUE, "-"),
    "DfQ2": ("unreliable, with questions (DfQ2)", figures.ORANGE, "--"),
    "Df4": ("unreliable, defined only (Df4)", figures.VERMILLION, "-"),
    "heldout": ("held out", figures.BLACK, "-."),
    "reliable": ("reliable tag", figures.BLUE, "-"),
    "unreliable": ("unreliable tag", figures.VERMILLION, "-"),
}
OTHERS = (figures.GREEN, figures.PURPLE, figures.GREY)


@styled
def accuracies(metrics: pd.DataFrame, phases: Mapping[str, int], chance: Mapping[str, float]) -> Figure:
    """Accuracy of each set of questions over training: reliable sets in blues, unreliable ones in oranges.

    Args:
        metrics: a column `step` and columns named `SET_accuracy`, such as Dt3_accuracy; a row may leave
            any of them NaN.
        phases: name -> its first step; a vertical line each.
        chance: label -> the accuracy of a guess; a dotted horizontal line each.

    Raises:
        ValueError: no column `step`, or none that ends in `_accuracy`.
    """
    names = [str(name) for name in metrics.columns if str(name).endswith("_accuracy")]
    if "step" not in metrics.columns or not names:
        raise ValueError(
            f"the metrics have the columns {list(map(str, metrics.columns))}; expected 'step' and some that "
            "end in '_accuracy'"
        )
    known = [f"{name}_accuracy" for name in SETS if f"{name}_accuracy" in names]
    figure, axes = figures.new(8.0, 4.6)
    others = iter(OTHERS * len(names))
    for name in [*known, *(name for name in names if name not in known)]:
        short = name.removesuffix("_accuracy")
        label, color, line = SETS[short] if short in SETS else (short, next(others), "-")
        rows = metrics[["step", name]].dropna()
        marker = "o" if len(rows) == 1 else ""
        axes.plot(
            rows["step"],
            rows[name],
            label=label,
            color=color,
            linestyle=line,
            linewidth=1.6,
            marker=marker,
            clip_on=False,  # half of a line along 0 or 1 would be cut off
        )
    axes.set(xlabel="training step", ylabel="accuracy", ylim=(0.0, 1.0))
    axes.margins(x=0.01)
    for first in phases.values():
        axes.axvline(first, color=figures.GREY, linewidth=0.8, zorder=1)
    for guess in chance.values():
        axes.axhline(guess, color=figures.GREY, linewidth=1.0, linestyle=":", zorder=1)
    figure.suptitle("Accuracy of each set of questions over training")
    figure.legend(loc="outside lower center", ncols=min(len(names), 3), fontsize=8.5)
    _name_guesses(axes, chance)
    _name_phases(figure, axes, phases)
    return figure


def _name_guesses(axes: Axes, chance: Mapping[str, float]) -> None:
    """The labels right of the axes, from the lowest up, pushed apart where the lines are close."""
    place = -np.inf
    for label, guess in sorted(chance.items(), key=lambda item: item[1]):
        place = max(place + 0.05, guess)
        axes.annotate(
            label,
            (1.01, place),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color="#555555",
        )


def _name_phases(figure: Figure, axes: Axes, phases: Mapping[str, int]) -> None:
    """The names above the axes, each starting at its line; one that would cover another moves up a row."""
    figure.draw_without_rendering()
    ends: list[float] = []
    for name, first in sorted(phases.items(), key=lambda item: item[1]):
        text = axes.annotate(
            figures.phase_in_words(name),
            (first, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8.5,
        )
        box = text.get_window_extent()
        row = next((i for i, end in enumerate(ends) if box.x0 > end + 4), len(ends))
        ends[row : row + 1] = [box.x1]
        text.set_position((0, 4 + 11 * row))
