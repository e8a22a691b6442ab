"""How many models are stacked at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

CHUNK = 16
"""Models stacked at most, whatever their size: more no longer share what comes before the first change."""

HALF, QUARTER = 1 / 2, 1 / 4
"""Shares of the memory, for stacks that are held beside other models."""

_stacked_bytes: ContextVar[int] = ContextVar("stacked_bytes", default=2**27)


@contextmanager
def max_memory(n_bytes: int) -> Iterator[None]:
    """Inside, verbs stack models up to this many bytes at a time (one model always), in place of 128 MiB.

        with dy.max_memory(2**32):
            dy.patch_gradients(recipe, checkpoint, contrasts, sites, measure)

    Beside a stack a verb holds up to two gradients and two models. Results depend on it only to rounding; the
    default is a constant, so that the same call gives the same bits whatever else the machine does. It holds in
    this thread; workers of a sweep have the default.

    Args:
        n_bytes: more than 0.

    Raises:
        ValueError: it is not.
    """
    if n_bytes <= 0:
        raise ValueError(f"max_memory({n_bytes}): give a number of bytes above 0, such as 2**30.")
    token = _stacked_bytes.set(n_bytes)
    try:
        yield
    finally:
        _stacked_bytes.reset(token)


def at_most(tensors: Iterable[Tensor], share: float = 1) -> int:
    """How many copies of these tensors are stacked in a share of the memory."""
    room = share * _stacked_bytes.get()
    return min(CHUNK, max(1, int(room // max(1, sum(t.nbytes for t in tensors)))))


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])
