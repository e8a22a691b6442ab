"""The task of a run, rebuilt from the config kept with its trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynamics.config import AcronymsRun, FactsRun, IoiRun, StudyConfig, read
from dynamics.tasks.acronyms import AcronymsTask
from dynamics.tasks.aliases import AliasTask
from dynamics.tasks.facts import FactsTask
from dynamics.tasks.ioi import IoiTask
from dynamics.tasks.task import Task

_TASKS: dict[type, Callable[[Any], Task]] = {
    StudyConfig: AliasTask,
    IoiRun: IoiTask,
    AcronymsRun: AcronymsTask,
    FactsRun: FactsTask,
}


def load(config: Mapping[str, Any]) -> Task:
    """The task of a run, of whichever kind its config names.

    Raises:
        ConfigError: the config names no task, as that of a run of one's own.
    """
    known = read(config)
    return _TASKS[type(known)](known)
