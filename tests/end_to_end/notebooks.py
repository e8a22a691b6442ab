"""The code of a MyST notebook, run in this process."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
CELL = re.compile(r"```\{code-cell\}[^\n]*\n(?::[^\n]*\n)*(.*?)```", re.DOTALL)


def cells(name: str) -> list[str]:
    """The code cells of a page of docs/."""
    return CELL.findall((DOCS / name).read_text())


def run(name: str) -> dict[str, Any]:
    """The names that a page's code leaves behind, run from its first cell to its last."""
    names: dict[str, Any] = {}
    for i, code in enumerate(cells(name)):
        exec(compile(code, f"{name}, cell {i}", "exec"), names)
    return names
