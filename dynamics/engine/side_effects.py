"""What a user's function writes into beside its result: seen, put back, and named."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dynamics.models.functional import attributes_restored
from dynamics.steps.fallbacks import Fallback

Array = npt.NDArray[Any]

MOST_REACHED = 10_000
"""Objects that are looked at; a function that reaches more is taken to write into some of them."""

KEPT_BYTES = 2**20
"""Bytes of a tensor of which a copy is kept; a write into a larger one is seen and stays."""

_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, ModuleType, torch.dtype, torch.device)
_LIBRARIES = sys.stdlib_module_names | {"builtins", "torch", "numpy", "dynamics", "checkpoints"}


@contextmanager
def nothing_written(
    model: nn.Module, functions: Iterable[Any], batch: Any, parameters: Iterable[Tensor]
) -> Iterator[None]:
    """Inside, functions of (model, batch) are called; afterwards all they reach is what it was.

    That is: their closures, the globals they name, the attributes of their objects, the batch; and of the model its
    attributes, which a forward pass may write. Files, and objects of C libraries, are not seen.

    Args:
        parameters: that stand in for the model's; writes into them are seen, and stay.

    Raises:
        Fallback: they wrote into the batch, the parameters, or what is their own: a list, a counter.
    """
    held = _Held(model, [*functions, batch])
    versions = [(tensor, tensor._version) for tensor in parameters]
    try:
        with attributes_restored(model):
            yield
    finally:
        written = held.put_back()
    if any(tensor._version != version for tensor, version in versions):
        written = "the parameters"
    if written:
        raise Fallback(f"a measure writes into {written}, which one call for all models would spoil")


class _Held:
    """What can be reached from some roots and written into, as it is when this is made."""

    def __init__(self, model: nn.Module, roots: Iterable[Any]) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._names: list[tuple[dict[str, Any], str, Any]] = []
        self._cells: list[tuple[CellType, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []
        self._arrays: list[tuple[Array, Array]] = []
        seen = {id(module) for module in model.modules()}
        seen |= {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        waiting = list(roots)
        alive = []  # so that no id is given twice
        while waiting:
            value = waiting.pop()
            if isinstance(value, _PLAIN) or id(value) in seen:
                continue
            seen.add(id(value))
            alive.append(value)
            if len(alive) > MOST_REACHED:
                raise Fallback(f"a measure reaches more than {MOST_REACHED} objects that it may write into")
            waiting += self._look_into(value)

    def _look_into(self, value: Any) -> Iterable[Any]:
        """Note one object, and give what it leads to."""
        if isinstance(value, Tensor):
            if not value.is_inference():  # which nothing may write into
                small = value.numel() * value.element_size() <= KEPT_BYTES and not value.requires_grad
                self._tensors.append((value, value._version, value.detach().clone() if small else None))
            return ()
        if isinstance(value, np.ndarray):
            if value.nbytes <= KEPT_BYTES:
                self._arrays.append((value, value.copy()))
            return ()
        if type(value) in _CONTAINERS:
            copy = dict(value) if isinstance(value, dict) else list(value)
            self._containers.append((value, copy))
            return copy.values() if isinstance(copy, dict) else copy
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, MethodType):
            return value.__self__, value.__func__
        if isinstance(value, partial):
            return value.func, value.args, value.keywords
        if isinstance(value, FunctionType):
            return self._function(value)
        attributes = getattr(value, "__dict__", None)
        found = [attributes] if isinstance(attributes, dict) else []
        for kind in type(value).__mro__:
            if not _of_a_library(kind.__module__):
                found += [v for v in vars(kind).values() if type(v) in (*_CONTAINERS, FunctionType)]
        return found

    def _function(self, function: FunctionType) -> Iterable[Any]:
        """Closure, defaults and attributes of a function, and the globals it names."""
        if _of_a_library(function.__module__):
            return ()
        found: list[Any] = [function.__defaults__, function.__kwdefaults__, function.__dict__]
        for cell in function.__closure__ or ():
            content = _content(cell)
            self._cells.append((cell, content))
            found.append(content)
        known = function.__globals__
        for name in _names(function.__code__):
            if name in known:
                self._names.append((known, name, known[name]))
                found.append(known[name])
        return found

    def put_back(self) -> str:
        """Make everything what it was; what had been written, in words, empty where nothing was."""
        written = []
        for cell, content in self._cells:
            if _content(cell) is not content:
                if content is _EMPTY:
                    del cell.cell_contents
                else:
                    cell.cell_contents = content
                written.append("a variable of the function around it")
        for known, name, value in self._names:
            if known.get(name) is not value:
                known[name] = value
                written.append(f"the global {name}")
        for container, copy in self._containers:
            if not _same(container, copy):
                container.clear()
                (container.extend if isinstance(container, list | deque) else container.update)(copy)
                written.append(f"a {type(container).__name__} that it reaches")
        for tensor, version, copy in self._tensors:
            if tensor._version != version:
                if copy is not None:
                    with torch.no_grad():
                        tensor.copy_(copy)
                written.append("a tensor that it reaches")
        for array, copy in self._arrays:
            if array.tobytes() != copy.tobytes():
                array[...] = copy
                written.append("an array that it reaches")
        return written[0] if written else ""


_EMPTY = object()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _EMPTY


def _names(code: CodeType) -> set[str]:
    """Names that a function's code looks up, also inside functions that it defines."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)


@cache
def _of_a_library(module: str | None) -> bool:
    """Whether code is the standard library's, ours or an installed package's, whose functions keep nothing of what
    they are given; what its objects keep is looked at."""
    package = (module or "").partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return package in _LIBRARIES or "site-packages" in file


def _same(container: Any, copy: Any) -> bool:
    """Whether a container holds the very objects it held."""
    if len(container) != len(copy):
        return False
    if isinstance(container, set):
        return container == set(copy)
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in copy.items())
    return all(ours is theirs for ours, theirs in zip(container, copy, strict=True))
