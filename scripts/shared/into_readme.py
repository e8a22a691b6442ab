"""Tables that scripts print and put into the README or a page of docs/, with when, where and by which script."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.stats
import torch
from matplotlib.figure import Figure

import dynamics as dy

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT
"""The folder of `README.md`, `docs/` and `.readme/`."""


def write(name: str, text: str) -> None:
    """Put a table between the marks `<!-- name: begin -->` and `<!-- name: end -->` of the page that has them.

    Raises:
        ValueError: no page has the marks, or several have.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    holding = [page for page in pages() if begin in page.read_text()]
    if len(holding) != 1:
        found = ", ".join(str(page.relative_to(HOME)) for page in holding) or "no page"
        raise ValueError(f"found the marks {begin} in {found}; expected them in one page")
    (page,) = holding
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def pages() -> list[Path]:
    """The README and the pages of the documentation."""
    return [HOME / "README.md", *sorted((HOME / "docs").rglob("*.md"))]


def beside(name: str) -> Path:
    """Where a picture or page that the README or a page of docs/ names lies."""
    return HOME / ".readme" / name


def conclude(
    given: argparse.Namespace,
    name: str,
    text: str,
    figure: Figure | None = None,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Print a table and draw its figure into the folder `--out`; with `--readme` both go into their page too."""
    print(text)
    places = [] if figure is None else [given.out / f"{name}.png"]
    if given.readme:
        write(name, text)
        places += [] if figure is None else [beside(f"{name}.png")]
    for place in places:
        dy.plots.save(figure, place, provenance)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def interval(values: npt.ArrayLike) -> str:
    """Mean with its 95 % t interval over the last axis."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*map(float, dy.statistics.mean_interval(values)))


def correlation_interval(values: npt.ArrayLike) -> str:
    """Mean with its 95 % t interval on the scale of Fisher's z, so never outside -1 to 1; over the last axis."""
    found = dy.statistics.mean_interval(np.arctanh(np.asarray(values, dtype=float)))
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*map(float, np.tanh(found)))


def bootstrap_interval(values: npt.ArrayLike) -> tuple[float, float, float]:
    """Mean, and the 95 % percentile interval of the means of redrawn values: never outside what they can be.

    Of twelve skewed values it covers nine times in ten rather than nineteen in twenty.
    """
    units = np.asarray(values, dtype=float)
    if units.size < 2:
        return float(units.mean()) if units.size else np.nan, np.nan, np.nan
    redrawn = scipy.stats.bootstrap((units,), np.mean, method="percentile", rng=np.random.default_rng(0))
    return float(units.mean()), *map(float, redrawn.confidence_interval)


def bootstrapped(values: npt.ArrayLike) -> str:
    """Mean with its bootstrap interval; a dash where there is no value."""
    mean, low, high = bootstrap_interval(values)
    return "–" if np.isnan(mean) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def stamp(script: str) -> str:
    """When, where and by which script a table was made."""
    machine = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
    name = Path(script).resolve().relative_to(ROOT).as_posix()
    return f"{datetime.now(UTC):%Y-%m-%d}, {machine}, torch {torch.__version__}; `{name}`."
