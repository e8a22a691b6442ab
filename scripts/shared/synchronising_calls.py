"""Calls for which a GPU would have to be waited for, counted on any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
}
"""Operations whose result the host reads: `.item()`, `float(tensor)` and `bool(tensor)` are the first."""

TRANSFERS = {"cpu", "tolist", "numpy"}
"""Methods of tensors that copy from a GPU; on the CPU they are no operations."""


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.counts[name] += 1
        found = func(*args, **(kwargs or {}))
        if name in ("index", "index_put_", "_index_put_impl_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self.counts["a boolean index"] += 1
        return found


class _Methods(TorchFunctionMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in TRANSFERS:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts, by name, the synchronising calls that this thread makes inside."""
    counts: Counter[str] = Counter()
    with _Methods(counts), _Operations(counts):
        yield counts
