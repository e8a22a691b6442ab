"""Which config a run has: `task.name` says it; the alias task has no name and is known by its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dynamics.config.aliases import AliasConfig, StudyConfig
from dynamics.config.checks import did_you_mean, require
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
    """The config class for the keys of a config's plain data; without any, that of the alias study.

    Raises:
        ConfigError: there is no such task.
    """
    task = data.get("task", {})
    name = task.get("name", ALIASES) if isinstance(task, Mapping) else ALIASES
    others = [kind for kind in KINDS if kind != ALIASES]
    require(
        name in KINDS,
        f"task.name is {name!r}; it must be one of {', '.join(map(repr, others))}. The alias task has no name."
        f"{did_you_mean(str(name), others)}",
    )
    return KINDS[name]


def task_name(data: Mapping[str, Any]) -> str | None:
    """The toolkit's task that a run's config names; None where it names none, as that of a run of one's own may."""
    task = data.get("task")
    if not isinstance(task, Mapping):
        return None
    own = {f.name for f in fields(AliasConfig)} - {"seed", "order_seed"}
    name = task.get("name", ALIASES if own & set(task) else None)
    return name if name in KINDS else None


def read(data: Mapping[str, Any]) -> RunConfig:
    """The config written by `to_dict`, of whichever task.

    Raises:
        ConfigError: it names no task, or one that there is not.
    """
    kind = kind_of(data)
    require(
        task_name(data) is not None,
        f"the config names no task: found the keys {sorted(data)}, expected a section `task` as dynamics fit "
        f"writes it, of {', '.join(KINDS)}. A run of your own is replayed by its recipe: "
        "dy.steps.verify(recipe, run, batch_of).",
    )
    return kind.from_dict(data)
