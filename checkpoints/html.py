"""Small tables of HTML, by which notebooks show what a value holds."""

from collections.abc import Iterable, Sequence
from html import escape


def facts(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """A value as a table: its kind above, a name and what it is in each row."""
    return table(title, (), [(name, value) for name, value in rows])


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a caption; every cell is text."""
    lines = [f"<th>{escape(name)}</th>" for name in head]
    body = ["".join(f"<td style='text-align:left'>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return "".join(
        [
            f"<table><caption style='text-align:left;font-weight:bold'>{escape(title)}</caption>",
            f"<tr>{''.join(lines)}</tr>" if lines else "",
            *(f"<tr>{row}</tr>" for row in body),
            "</table>",
        ]
    )
