"""Progress bars, of calls that take longer than some seconds."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

SECONDS_BEFORE_PROGRESS = 5


def progress_bar(verb: str, total: int, unit: str) -> tqdm[Any]:
    """A bar that appears once a call has taken 5 s; `bar.update(n)` moves it.

    Args:
        verb: what it is called.
        total: units in all.
        unit: what one is.
    """
    return tqdm(total=total, desc=verb, unit=unit, delay=SECONDS_BEFORE_PROGRESS)
