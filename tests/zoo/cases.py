"""Cases of a parametrisation, of which the quick tests take the first."""

from collections.abc import Iterable
from typing import Any

import pytest


def first_quick(cases: Iterable[Any], n: int = 1) -> list[Any]:
    """All cases, those after the first `n` marked slow."""
    return [case if i < n else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]
