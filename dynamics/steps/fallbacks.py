"""Falling back from a fast path (vmap, a batched backward pass) to a slow one; running out of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_log = logging.getLogger(__name__)


class Fallback(Exception):
    """A fast path does not hold for this model; the message is the reason in one line."""


class ComputePaths:
    """Which path each part of one call took (gradients, steps, measures, ...), for the result's provenance.

    Of each part the first fallback is logged, once a call.

    Args:
        verb: the call, as the log names it.
    """

    def __init__(self, verb: str = "a call") -> None:
        self._verb = verb
        self._taken: dict[str, list[str]] = {}
        self._fell_back: set[str] = set()

    def took(self, part: str, path: str) -> None:
        """A part took this path, as planned."""
        known = self._taken.setdefault(part, [])
        if not any(said == path or said.startswith(f"{path}, since ") for said in known):
            known.append(path)

    def fell_back(self, part: str, path: str, why: str) -> None:
        """A part takes this slower path, and why; only the first reason is kept."""
        if part not in self._fell_back:
            self._fell_back.add(part)
            self.took(part, f"{path}, since {why}")
            _log.warning("%s: %s: %s, since %s", self._verb, part, path, why)

    def facts(self) -> dict[str, str]:
        """The paths by part: what provenance keeps."""
        return {part: "; ".join(paths) for part, paths in sorted(self._taken.items())}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def reason(error: BaseException) -> str:
    """An error as one short line."""
    if isinstance(error, Fallback):
        return str(error)
    line = " ".join(str(error).replace(";", ",").split())
    return f"{type(error).__name__}: {line[:160]}{'...' if len(line) > 160 else ''}"


def in_halves(
    run: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], paths: ComputePaths, part: str
) -> list[R]:
    """run(items), or where memory runs out that of both halves by themselves, down to single items.

    Raises:
        The error itself, where it is another or memory does not hold a single item.
    """
    try:
        return list(run(items))
    except Exception as error:
        if len(items) < 2 or not out_of_memory(error):
            raise
        paths.fell_back(part, "fewer at a time", reason(error))
    middle = len(items) // 2
    return [
        result for half in (items[:middle], items[middle:]) for result in in_halves(run, half, paths, part)
    ]
