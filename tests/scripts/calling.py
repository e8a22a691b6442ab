"""Scripts called in this process as from the command line, and what they print read back."""

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

KEY = r"seed-(\d)-[0-9a-f]{8}"
"""What results of a run are called by."""


def checksums() -> dict[Path, str]:
    """Of the scripts, the README, the documentation and the pages and pictures that they may write into."""
    paths = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(p for folder in ("scripts", ".readme") for p in (ROOT / folder).rglob("*")),
    ]
    files = [p for p in paths if p.is_file() and "__pycache__" not in p.parts]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def call(script: ModuleType, *arguments: object) -> str:
    """What a script's `main` prints, which warns of nothing and changes nothing in the repository unasked."""
    before = checksums()
    said, told = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(told):
        script.main([str(argument) for argument in arguments])
    assert checksums() == before
    assert "Warning" not in told.getvalue()
    return said.getvalue()


def forks_of(folder: Path, run: Path, *seeds: int) -> Path:
    """The folder, with a run in place of both forks of some seeds."""
    for seed in seeds:
        (folder / f"seed-{seed}").mkdir(parents=True)
        for role in ("drawn", "exchanged"):
            (folder / f"seed-{seed}" / role).symlink_to(run)
    return folder


@contextmanager
def in_small(script: ModuleType, **constants: object) -> Iterator[None]:
    """With other values of a script's constants, such as fewer random sets."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(script, name, value)
        yield


def rows_of(text: str) -> list[list[str]]:
    """The cells of every row of the Markdown tables in a text, heads and rules included."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def named(folder: Path, pattern: str) -> dict[int, Path]:
    """Of the seeds 0 and 1 the one path each in a folder that is called by its run's key and the pattern."""
    found = {
        int(hit[1]): p for p in folder.iterdir() if (hit := re.fullmatch(KEY + re.escape(pattern), p.name))
    }
    assert sorted(found) == [0, 1]
    return found
