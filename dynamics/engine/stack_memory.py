"""Memory: how many models are stacked at a time, and trimming of what was freed (`malloc_trim`)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import islice
from typing import TypeVar

import psutil
import torch
from torch import Tensor

T = TypeVar("T")

MAX_STACKED = 16
"""Models stacked at most, whatever their size: more no longer share what comes before the first change."""

MAX_STACKED_GPU = 64
"""The same on a GPU, where launching kernels for few models at a time costs more than what they share."""

CPU_STACK_BYTES = 2**26
"""Bytes of a stack where memory abounds: a stack of this size, two gradients and what a pass leaves fit four models
of the size of the stack. Twice as much takes less time, and more memory than that."""

LARGE_MODEL_BYTES = 2**24
"""Bytes of parameters from which freed memory is trimmed and forward passes are resumed: below, it does not pay."""

HALF, QUARTER = 1 / 2, 1 / 4
"""Shares of the memory, for stacks that are held beside other models."""

_budget: ContextVar[int | None] = ContextVar("budget", default=None)


@contextmanager
def max_memory(n_bytes: int) -> Iterator[None]:
    """Inside, verbs stack models up to this many bytes at a time (one model always).

        with dy.max_memory(2**32):
            dy.patch_gradients(recipe, checkpoint, contrasts, sites, measure)

    Outside, on a GPU half of what is free; on a CPU too, but at most 64 MiB, so that the same call gives the same
    bits whatever else the machine does. Beside a stack a verb holds up to two gradients and two models. Results
    depend on the budget only to rounding. It holds in this thread; workers of a sweep have the default.

    Args:
        n_bytes: more than 0.

    Raises:
        ValueError: it is not.
    """
    if n_bytes <= 0:
        raise ValueError(f"max_memory({n_bytes}): give a number of bytes above 0, such as 2**30.")
    token = _budget.set(n_bytes)
    try:
        yield
    finally:
        _budget.reset(token)


def models_per_stack(tensors: Iterable[Tensor], share: float = 1, beside: int = 0) -> int:
    """How many models of these tensors are stacked in a share of the memory, beside some that every stack holds:
    less than 1 where memory is too short for these."""
    given = list(tensors)
    size = max(1, sum(t.nbytes for t in given))
    device = given[0].device if given else torch.device("cpu")
    most = MAX_STACKED_GPU if device.type == "cuda" else MAX_STACKED
    return min(most, max(1, memory_budget(device, share) // size) - beside)


def memory_budget(device: torch.device, share: float = 1) -> int:
    """A share of what stacks may take, in bytes."""
    return int(share * (_budget.get() or _free(device)))


def _free(device: torch.device) -> int:
    """Half of what is free on a device, and no more than is usual on a CPU."""
    if device.type != "cuda":
        return min(CPU_STACK_BYTES, _half_of_free_at_first())
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) // 2


@cache
def _half_of_free_at_first() -> int:
    """Half of what was free on the CPU when this process first asked."""
    return int(psutil.virtual_memory().available // 2)


def is_large(parameters: Mapping[str, Tensor]) -> bool:
    """Whether a model's memory and its single passes are worth some care."""
    return sum(p.nbytes for p in parameters.values()) >= LARGE_MODEL_BYTES


def trim_freed_memory(parameters: Mapping[str, Tensor]) -> None:
    """Have the C library return freed memory of a large model's gradients and copies to the system.

    It keeps as much as the model again otherwise. Nothing is done for small models, nor where the library has no
    `malloc_trim` (glibc has).
    """
    if is_large(parameters) and hasattr(_C_LIBRARY, "malloc_trim"):
        _C_LIBRARY.malloc_trim(0)


_C_LIBRARY = ctypes.CDLL(None)


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])
