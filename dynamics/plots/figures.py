"""What all figures share: style, colours, words, a fresh Figure, and a file."""

from __future__ import annotations

import io
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import matplotlib
import matplotlib.figure
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from dynamics import results, statistics
from dynamics.config import ConfigError
from dynamics.config.kinds import kind_of, task_name
from dynamics.results.files import replacing

# Okabe & Ito 2008: distinguishable with any common colour vision.
BLACK, GREY = "#000000", "#888888"
ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILLION, PURPLE = "#D55E00", "#CC79A7"

STYLE = Path(__file__).with_name("dynamics.mplstyle")
"""The style sheet of all figures."""

METADATA = {".png": "provenance", ".svg": "Description", ".pdf": "Subject"}
"""The kinds of file, and what each calls the text that a figure carries."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Figure(matplotlib.figure.Figure):
    """A matplotlib Figure that a notebook shows as a cell's last expression, without pyplot."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=100)
        return image.getvalue()


def styled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that draws in the package's style sheet; the user's settings are put back."""

    @wraps(function)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with matplotlib.rc_context(fname=STYLE):
            return function(*args, **kwargs)

    return drawn


@styled
def save(
    figure: matplotlib.figure.Figure,
    path: str | os.PathLike[str],
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write a figure as PNG (150 dpi), SVG or PDF, with its provenance in the file's metadata.

    A figure can be made again from its dataset, so an older file of that name is replaced, whole or not at
    all. Its folder is made if absent.

    Args:
        figure: any figure; drawn without pyplot.
        path: ends in .png, .svg or .pdf.
        provenance: keyword -> text, such as {"provenance": dataset.attrs["provenance"]}. A PNG keeps the keywords;
            an SVG has the texts as its description, a PDF as its subject.

    Raises:
        ValueError: the name ends in something else.
    """
    target = Path(path)
    kind = target.suffix.lower()
    if kind not in METADATA:
        raise ValueError(
            f"found the name {target.name}; figures are saved as PNG, SVG or PDF, expected {target.stem}.png, "
            f"{target.stem}.svg or {target.stem}.pdf"
        )
    texts = dict(provenance or {})
    if kind != ".png" and texts:
        texts = {METADATA[kind]: "\n".join(texts.values())}
    image = io.BytesIO()
    figure.savefig(image, format=kind[1:], metadata=texts)
    with replacing(target) as temporary:
        temporary.write_bytes(image.getvalue())


def new(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own, in inches, with one pair of axes and no pyplot state."""
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


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


def kinds(dataset: xr.Dataset) -> str:
    """What the sites are, in a word: component, head, matrix; site where they are of several levels or of none."""
    levels = np.unique(dataset["level"].values) if "level" in dataset.coords else np.array([])
    plurals = {"components": "component", "heads": "head", "matrices": "matrix", "layers": "layer"}
    return plurals.get(str(levels[0]), "site") if levels.size == 1 else "site"


def units_of(dataset: xr.Dataset) -> str:
    """How many units an estimate is of: `30 examples of one run`, `5 runs`."""
    counts = dataset["n"].values
    many = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    unit, _, of = str(dataset.attrs.get("unit", "")).partition(", ")
    if not unit:
        return f"n = {many}"
    return f"{many} {unit}{'' if many == '1' else 's'}{' of one run' if of == 'in this run' else ''}"


def described(dataset: xr.Dataset) -> str:
    """How many units, and what is selected: `30 examples of one run, correct logit, X2 step 10 (step 4510)`."""
    words = [units_of(dataset)]
    for name in ("measure", "step", "source_step", "seed", "optimizer"):
        if name in dataset.coords and dataset[name].ndim == 0:
            value = dataset[name].item()
            if name == "measure":
                words.append(str(value).replace("_", " "))
            elif name == "optimizer":
                words.append(f"{value} optimizer state")
            elif name == "step":
                words.append(step_in_words(dataset, value))
            else:
                words.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(words)


def step_in_words(dataset: xr.Dataset, step: int) -> str:
    """A training step by its phase where the provenance tells it: `X2 step 10 (step 4510)`; else `step 4510`."""
    try:
        config = json.loads(dataset.attrs.get("provenance", "{}"))["config"]
        if task_name(config) is None:
            return f"step {step}"
        phase, local = kind_of(config).from_dict(config).phases.locate(step)
    except (KeyError, TypeError, json.JSONDecodeError, ConfigError):  # provenance of something else
        return f"step {step}"
    return f"{phase_in_words(phase)} step {local} (step {step})"


def phase_in_words(phase: str) -> str:
    """A phase as texts name it: x1 is X1, late is late."""
    return phase.upper() if len(phase) < 3 else phase


def entitle(axes: Axes, first: str, dataset: xr.Dataset) -> None:
    """A title over the axes: its first line, then what the dataset holds, broken to the figure's width."""
    figure = axes.get_figure(root=True)
    width = int(12 * (figure.get_figwidth() if figure else 8))
    axes.set_title("\n".join([first, *textwrap.wrap(described(dataset), width)]))


def power_of_ten(largest: float) -> int:
    """The power of ten that numbers up to the largest are written in: 0 unless they are tiny or huge."""
    if not np.isfinite(largest) or largest == 0 or 0.01 <= largest < 10_000:
        return 0
    return int(np.floor(np.log10(largest)))


def with_power(label: str, power: int) -> str:
    """An axis label with its power of ten: `effect (logit)` in 10⁻⁴ is `effect (10⁻⁴ logit)`."""
    if not power:
        return label
    written = f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    return label.replace("(", f"({written} ") if label.endswith(")") else f"{label} ({written})"


def number(value: float, largest: float) -> str:
    """A short number beside others: two digits of a number a third as large as the largest of them."""
    if not np.isfinite(largest) or largest == 0:
        return "0"
    decimals = 1 - int(np.floor(np.log10(largest / 3)))
    text = f"{value:.{max(decimals, 0)}f}" if -3 <= decimals <= 4 else f"{value:.0e}"
    return text.lstrip("-") if float(text) == 0 else ("−" + text[1:] if value < 0 else text)
