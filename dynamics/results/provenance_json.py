"""Provenance: where a result comes from, as one JSON object."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = ("torch", "transformer_lens", "lightning", "numpy", "xarray", "training-dynamics")


def provenance(**facts: Any) -> str:
    """Where a result comes from, as one JSON object.

    The given facts, and: `date` (UTC, ISO 8601), `python`, `versions` of the packages that matter, and, where
    this package lies in a git working tree, its `commit` and whether it was `modified` since.

    Raises:
        TypeError: a fact that JSON cannot hold. Arrays become lists, paths become strings.
        ValueError: a fact that is not finite, or has one of the names above.
    """
    known: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        **_commit(),
    }
    if taken := sorted(set(facts) & {*known, "commit", "modified"}):
        raise ValueError(f"found facts called {taken}; these names are filled in by provenance itself")
    return json.dumps({**facts, **known}, sort_keys=True, allow_nan=False, default=_plain)


def parse(text: str) -> dict[str, Any]:
    """The facts of a text that `provenance` made, or an error."""
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError(
            f"provenance holds {type(facts).__name__}; expected a JSON object, as from provenance()"
        )
    return facts


def common(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What two JSON objects share, objects inside objects included."""
    shared: dict[str, Any] = {}
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            shared[key] = common(one[key], other[key])
        elif one[key] == other[key]:
            shared[key] = one[key]
    return shared


def paths_taken(many: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """{"paths": ...} of several results joined: every path that a part of one of them took; {} where none says.

    Args:
        many: facts of each, in order.
    """
    joined: dict[str, dict[str, None]] = {}
    for facts in many:
        for part, paths in facts.get("paths", {}).items():
            joined.setdefault(part, {}).update(dict.fromkeys(paths.split("; ")))
    return {"paths": {part: "; ".join(paths) for part, paths in sorted(joined.items())}} if joined else {}


def _plain(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a fact of provenance is {type(value).__name__}; expected what JSON can hold")


@functools.cache
def _versions() -> dict[str, str]:
    """Of the packages that results depend on, asked once."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _commit() -> dict[str, str | bool]:
    """The commit of this package's code, asked once; empty outside a working tree that holds it."""
    folder = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not the tree of somebody's virtual environment
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../checkpoints")
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return {}
