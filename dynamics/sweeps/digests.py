"""Hashes of what values hold, so that what was computed for one question is never taken for another's answer.

A function counts by its code, its defaults, what it closes over and, of its own module, what it refers to; a
library's function or class by its name and the library's version; tensors by their bits. Two values of one hash
are interchangeable; two of different hashes may be, which costs a computation and nothing else.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamics.sweeps.errors import SweepError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, Path)
_ATOMS = (*_PLAIN, np.generic, np.ufunc, torch.dtype, torch.device, torch.layout)
_OF_A_LIBRARY = (type, BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
_ABOVE = ("__main__.py", "cli", "plots", "report", "studies", "training")
"""Parts of the package that have no say in a sweep's numbers."""


def digest(*values: object) -> str:
    """A hash of the values, 32 hexadecimal digits.

    Raises:
        SweepError: one of them holds what cannot be told from others of its kind.
    """
    return _Digests().of(values).hex()[:32]


@cache
def sources() -> str:
    """A hash of the code of `checkpoints` and of all of `dynamics` that a sweep runs through."""
    here = Path(__file__).parents[1]
    code = hashlib.sha256()
    for root in (here, here.parent / "checkpoints"):
        for path in sorted(root.rglob("*.py")):
            if path.relative_to(root).parts[0] not in _ABOVE:
                code.update(_framed(str(path.relative_to(root.parent)).encode(), path.read_bytes()))
    return code.hexdigest()[:32]


class _Digests:
    """Hashes of values that hold each other; functions, classes and objects are visited once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[object, bytes]] = {}

    def of(self, value: object) -> bytes:
        if id(value) in self._known:
            return self._known[id(value)][1]
        visited = isinstance(value, FunctionType | type) or hasattr(value, "__dict__")
        if visited:  # what refers back to it finds this until it is known
            self._known[id(value)] = value, b"itself"
        found = hashlib.sha256(_framed(type(value).__qualname__.encode(), *self._parts(value))).digest()
        if visited:
            self._known[id(value)] = value, found
        return found

    def _parts(self, value: Any) -> Iterator[bytes]:
        """What a value consists of, in an order of its own."""
        if isinstance(value, _ATOMS):
            yield repr(value).encode()
        elif isinstance(value, Tensor):
            dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
            yield f"{value.dtype} {tuple(value.shape)}".encode()
            plain = dense.cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
            yield plain.view(torch.uint8).numpy().tobytes()
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            yield f"{value.dtype} {value.shape}".encode()
            yield np.ascontiguousarray(value).tobytes()
        elif isinstance(value, Mapping):
            yield from (self.of(part) for item in value.items() for part in item)
        elif isinstance(value, set | frozenset):
            yield from sorted(self.of(part) for part in value)
        elif isinstance(value, list | tuple):
            yield from (self.of(part) for part in value)
        elif isinstance(value, partial):
            yield from (self.of(part) for part in (value.func, value.args, value.keywords))
        elif isinstance(value, MethodType):
            yield from (self.of(part) for part in (value.__self__, value.__func__))
        elif isinstance(value, CodeType):
            named = (value.co_code, value.co_names, value.co_varnames, value.co_freevars)
            yield from (self.of(part) for part in (*named, value.co_consts))
        elif isinstance(value, FunctionType):
            yield from self._function(value)
        elif isinstance(value, _OF_A_LIBRARY):
            yield from self._named(value)
        elif isinstance(value, ModuleType):
            yield value.__name__.encode()
        elif hasattr(value, "__wrapped__"):
            yield self.of(value.__wrapped__)
        elif is_dataclass(value):
            yield self.of(type(value))
            yield from (self.of(getattr(value, f.name)) for f in fields(value))
        else:
            yield self.of(_reduced(value))

    def _function(self, function: FunctionType) -> Iterator[bytes]:
        yield from self._named(function)
        yield self.of(function.__code__)
        yield from (self.of(part) for part in (function.__defaults__, function.__kwdefaults__))
        yield from (self.of(cell.cell_contents) for cell in function.__closure__ or () if _filled(cell))
        if _version(function.__module__) is None:
            for name in sorted(_names(function.__code__) & function.__globals__.keys()):
                value = function.__globals__[name]
                if not isinstance(value, ModuleType) and not name.startswith("__"):
                    yield name.encode()
                    yield self.of(value)

    def _named(self, value: Any) -> Iterator[bytes]:
        """Name and version of a function or class; of a user's class also what it consists of."""
        module = getattr(value, "__module__", None)
        version = _version(module)
        yield f"{module} {value.__qualname__} {version}".encode()
        if isinstance(value, type) and version is None:
            yield from (self.of(base) for base in value.__bases__)
            for name, part in sorted(vars(value).items()):
                code = next((getattr(part, a) for a in _HOLDING_CODE if hasattr(part, a)), part)
                if isinstance(code, (*_PLAIN, FunctionType)) and name != "__module__":
                    yield name.encode()
                    yield self.of(code)


_HOLDING_CODE = ("__wrapped__", "__func__", "fget", "func")
"""Where cached functions, class methods, properties and cached properties keep their function."""


def _reduced(value: Any) -> object:
    """What pickle would rebuild an object from."""
    try:
        return value.__reduce_ex__(4)
    except TypeError as error:
        raise SweepError(
            f"a {type(value).__name__} cannot be told from others of its kind, so that no result could be "
            "kept under its name. Use functions and plain values instead, or leave out= away."
        ) from error


def _framed(*parts: bytes) -> bytes:
    """The parts one after another, each with its length, so that no two lists of parts read alike."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that nothing was assigned to yet
        return False


def _names(code: CodeType) -> set[str]:
    """All names that code refers to, the functions inside it included."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)


@cache
def _version(module: str | None) -> str | None:
    """What stands for all the code of a library's module; None for a user's own."""
    top = (module or "builtins").split(".")[0]
    if top in ("dynamics", "checkpoints"):
        return sources()
    if top in sys.stdlib_module_names and top != "__main__":
        return ".".join(map(str, sys.version_info[:3]))
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    if any(file.startswith(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")):
        return str(getattr(sys.modules[top], "__version__", ""))
    return None
