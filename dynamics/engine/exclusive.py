"""One verb at a time in a process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_RUNNING = threading.RLock()


def exclusive(verb: Callable[P, R]) -> Callable[P, R]:
    """The same verb, which waits while another thread of the process is inside one.

    Verbs lend the recipe's model other parameters, modes and hooks, and exchange the global random numbers, and
    give all of it back; two at once would take each other's. A verb may call verbs.
    """

    @wraps(verb)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _RUNNING:
            return verb(*args, **kwargs)

    return alone
