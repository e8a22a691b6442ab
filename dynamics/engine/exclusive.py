"""One verb at a time in a process, and Ctrl-C inside one leaves the model as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from checkpoints.rng import RngState
from dynamics.recipe import Recipe

P = ParamSpec("P")
R = TypeVar("R")

_RUNNING = threading.RLock()
_OF_TORCH = frozenset(vars(nn.Module()))


def exclusive(verb: Callable[P, R]) -> Callable[P, R]:
    """The same verb, which waits while another thread of the process is inside one.

    Verbs lend the recipe's model other parameters, modes and hooks, and exchange the global random numbers, and
    give all of it back; two at once would take each other's. A verb may call verbs.

    What was lent is given back here once more where Ctrl-C ends the verb: it may fall into torch's own exchange of
    parameters, which then leaves some of them exchanged.
    """

    @wraps(verb)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _RUNNING:
            models = [each.model for each in (*args, *kwargs.values()) if isinstance(each, Recipe)]
            before, random = (
                [_held(module) for model in models for module in model.modules()],
                RngState.capture(),
            )
            try:
                return verb(*args, **kwargs)
            except (KeyboardInterrupt, SystemExit):
                for module, training, tables in before:
                    module.training = training
                    for table, items in tables:
                        table.clear()
                        table.update(items)
                random.apply()
                raise

    return alone


def _held(module: nn.Module) -> tuple[nn.Module, bool, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """A module, its mode, and its tables of parameters, buffers, submodules and hooks with what stands in them."""
    tables = [value for name, value in vars(module).items() if name in _OF_TORCH and isinstance(value, dict)]
    return module, module.training, [(table, dict(table)) for table in tables]
