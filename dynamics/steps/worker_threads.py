"""Worker threads: tensor arithmetic in units that one thread does alone, each with single-threaded kernels.

Thousands of small kernels, each of which waits until all of torch's threads are done, are slower with two threads
than with one. Units, blocks of a parameter say, wait for each other only at their end. What one computes does not
depend on who does it, so results are the same to the bit for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from threading import Event, Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


BLOCK = 2**17
"""Elements of a tensor that one thread takes at a time."""

GPU_BLOCK = 2**24
"""The same where each kernel has to be launched."""


class _Pool:
    """Threads beside the caller's, each with single-threaded kernels.

    Attributes:
        n_helpers: how many they are.
        ending: set when no unit is to be begun any more.
    """

    def __init__(self, n_helpers: int) -> None:
        self.n_helpers = n_helpers
        self.ending = Event()
        self._executor = ThreadPoolExecutor(n_helpers, "dynamics", torch.set_num_threads, (1,))

    def submit(self, function: Callable[[], None]) -> Future[None]:
        """Have one of the threads call the function, in a copy of the caller's context."""
        return self._executor.submit(copy_context().run, function)

    def close(self) -> None:
        """Return when no thread runs any more; what was not begun is left out."""
        self.ending.set()
        self._executor.shutdown(cancel_futures=True)


_pool: ContextVar[_Pool | None] = ContextVar("pool", default=None)
_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextmanager
def worker_threads(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, torch's kernels are single-threaded, and `spread` uses as many threads as torch had.

    Afterwards torch has as many as before, and no worker runs. Within another it changes nothing, nor for a model
    on a GPU, whose kernels queue anyway.

    Args:
        parameters: the model's.
    """
    if _inside.get() or any(p.device.type != "cpu" for p in parameters.values()):
        yield
        return
    n = torch.get_num_threads()
    pool = _Pool(n - 1) if n > 1 else None
    tokens = _inside.set(True), _pool.set(pool)
    try:
        torch.set_num_threads(1)
        yield
    finally:
        try:
            if pool is not None:
                pool.close()
        finally:
            torch.set_num_threads(n)
            _inside.reset(tokens[0])
            _pool.reset(tokens[1])


def has_workers() -> bool:
    """Whether there are threads beside the caller's."""
    return _pool.get() is not None


class Spread(Generic[T, R]):
    """Units of work that workers have begun on.

    Args:
        run: does one of them; it may read what others read and write what no other touches.
        units: in the order in which they are begun.
    """

    def __init__(self, run: Callable[[T], R], units: Sequence[T]) -> None:
        self._run = run
        self._units: Iterator[tuple[int, T]] = iter(enumerate(units))
        self._found: dict[int, R] = {}
        self._errors: dict[int, BaseException] = {}
        self._lock = Lock()
        self._pool = _pool.get()
        self._grad = torch.is_grad_enabled()
        helpers = min(self._pool.n_helpers, len(units)) if self._pool else 0
        self._futures = [self._pool.submit(self._work) for _ in range(helpers)] if self._pool else []

    def join(self) -> list[R]:
        """Help to do what is left, and return what was found, in the order of the units.

        Raises:
            The first error among the units; those that were not begun when it came are left out.
        """
        try:
            self._work()
        finally:
            with self._lock:
                self._units = iter(())
            wait([future for future in self._futures if not future.cancel()])
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._found[i] for i in sorted(self._found)]

    def _work(self) -> None:
        with torch.set_grad_enabled(self._grad):
            while (unit := self._next()) is not None:
                i, what = unit
                try:
                    self._found[i] = self._run(what)
                except Exception as error:  # noqa: BLE001 (raised by `join`, in the caller's thread)
                    self._errors[i] = error

    def _next(self) -> tuple[int, T] | None:
        with self._lock:
            if self._errors or (self._pool is not None and self._pool.ending.is_set()):
                return None
            return next(self._units, None)


def spread(run: Callable[[T], R], units: Sequence[T]) -> list[R]:
    """run(unit) for each of the units, in their order, by all threads that there are.

    Outside `worker_threads` the caller alone does them. Raises the first unit's error.
    """
    return Spread(run, units).join()


def blocks(tensor: Tensor) -> list[slice]:
    """A tensor's elements, flattened, in units that stay in the processor's cache; on a GPU in fewer, larger."""
    size = BLOCK if tensor.device.type == "cpu" else GPU_BLOCK
    return [slice(begin, begin + size) for begin in range(0, tensor.numel(), size)]
