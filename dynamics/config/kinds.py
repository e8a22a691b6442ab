"""Which config a run has: `task.name` says it; a task without a name is the alias task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamics.config.aliases import StudyConfig
from dynamics.config.checks import require
from dynamics.config.languages import AcronymsRun, FactsRun, IoiRun
from dynamics.config.parts import RunConfig

ALIASES = "aliases"

KINDS: dict[str, type[RunConfig]] = {
    ALIASES: StudyConfig,
    "ioi": IoiRun,
    "acronyms": AcronymsRun,
    "facts": FactsRun,
}
"""The config class of each task."""


def kind_of(data: Mapping[str, Any]) -> type[RunConfig]:
    """The config class that a config's plain data is of.

    Raises:
        ConfigError: there is no such task.
    """
    task = data.get("task", {})
    name = task.get("name", ALIASES) if isinstance(task, Mapping) else ALIASES
    named = ", ".join(repr(kind) for kind in KINDS if kind != ALIASES)
    require(name in KINDS, f"task.name is {name!r}; it must be one of {named}. The alias task has no name.")
    return KINDS[name]


def read(data: Mapping[str, Any]) -> RunConfig:
    """The config written by `to_dict`, of whichever task."""
    return kind_of(data).from_dict(data)
