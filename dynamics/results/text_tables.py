"""Tables in plain text: labels whole, numbers of three significant digits point under point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Cell = str | int | float | tuple[float, float]
"""A label; a count, shown whole; a number; or the bounds of an interval."""


def number(value: float) -> str:
    """Three significant digits, as in 0.120, 12.0, 120 and 1.20e-05; a dash for NaN, an integer whole."""
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:#.3g}".rstrip(".")


def interval(low: float, high: float) -> str:
    """`[0.120, 1.20]`; nothing where a bound is NaN."""
    return "" if math.isnan(low) or math.isnan(high) else f"[{number(low)}, {number(high)}]"


def aligned(rows: Sequence[Sequence[Cell]]) -> list[str]:
    """The lines of a table, all of one width: labels to the left, numbers with their points under one another.

    Args:
        rows: the first holds the headings; all are of one length, and below its heading a column holds cells of one
            kind.
    """
    columns = (_column(str(heading), cells) for heading, *cells in zip(*rows, strict=True))
    return ["  ".join(cells) for cells in zip(*columns, strict=True)]


def _column(heading: str, cells: Sequence[Cell]) -> list[str]:
    texts = [cell for cell in cells if isinstance(cell, str)]
    bounds = [cell for cell in cells if isinstance(cell, tuple)]
    if bounds:
        return _padded([heading, *(interval(*each) for each in bounds)], str.ljust)
    if texts:
        return _padded([heading, *texts], str.ljust)
    parts = [number(cell).partition(".") for cell in cells if not isinstance(cell, str | tuple)]
    before = _padded([whole for whole, _, _ in parts], str.rjust)
    after = _padded([point + decimals for _, point, decimals in parts], str.ljust)
    return _padded([heading, *map(str.__add__, before, after)], str.rjust)


def _padded(texts: Sequence[str], pad: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, texts), default=0)
    return [pad(text, width) for text in texts]
