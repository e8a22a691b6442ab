"""Which steps of a run to keep.

A schedule is a sorted tuple of steps. Checkpoint N is the state before batch N, so a run of `stop` steps
has `stop + 1` states: `stop` is the state at its end, and bounds are inclusive everywhere. A phase that
begins at step s and has n steps passes `start=s, stop=s + n`.

>>> union(every(50, stop=100), window(40, 43))
(0, 40, 41, 42, 43, 50, 100)
"""

from collections.abc import Iterable


def every(n: int, stop: int, start: int = 0) -> tuple[int, ...]:
    """Every n-th step from `start` on, up to and including `stop` where the grid meets it.

    Raises:
        ValueError: n below 1, or not 0 <= start <= stop.

    >>> every(4, stop=10)
    (0, 4, 8)
    """
    _check_bounds(start, stop)
    if n < 1:
        raise ValueError(f"every(n={n}): n is the number of steps between checkpoints, 1 or more")
    return tuple(range(start, stop + 1, n))


def log_spaced(stop: int, per_decade: int, start: int = 0) -> tuple[int, ...]:
    """Steps dense at `start` and ever sparser after: `per_decade` for each tenfold distance, both ends kept.

    Raises:
        ValueError: per_decade below 1, or not 0 <= start <= stop.

    >>> log_spaced(stop=30, per_decade=5)
    (0, 1, 2, 3, 4, 6, 10, 16, 25, 30)
    """
    _check_bounds(start, stop)
    if per_decade < 1:
        raise ValueError(f"log_spaced(per_decade={per_decade}): keep at least 1 step per decade")
    steps = {start, stop}
    k = 0
    while (distance := round(10 ** (k / per_decade))) < stop - start:
        steps.add(start + distance)
        k += 1
    return tuple(sorted(steps))


def window(start: int, stop: int) -> tuple[int, ...]:
    """Every single step from `start` to `stop`, both included.

    Raises:
        ValueError: not 0 <= start <= stop.

    >>> window(3, 6)
    (3, 4, 5, 6)
    """
    return every(1, stop, start)


def union(*schedules: Iterable[int]) -> tuple[int, ...]:
    """All steps of all schedules, sorted, each once.

    >>> union((0, 10), (5, 10))
    (0, 5, 10)
    """
    return tuple(sorted({step for schedule in schedules for step in schedule}))


def _check_bounds(start: int, stop: int) -> None:
    if not 0 <= start <= stop:
        raise ValueError(
            f"start={start}, stop={stop}: steps count up from 0, so 0 <= start <= stop is needed"
        )
