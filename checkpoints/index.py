"""The index of a trajectory: a line of JSON for each checkpoint, in the order in which they were stored.

It grows by appending: what is there is never written again. Every line ends with a checksum of itself and of the
line before. An append that was cut short leaves the beginning of a line, without its end, which counts for nothing;
any other line that does not fit is damage.
"""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints import files
from checkpoints.errors import TrajectoryError

SCHEMA_VERSION = 1
INDEX = "trajectory/index.jsonl"

_FILE = re.compile(r"trajectory/[\w-][\w.-]*\.h5")


@dataclass(frozen=True)
class Entry:
    """One checkpoint file: its path below the run folder, and what it must be."""

    step: int
    file: str
    sha256: str
    bytes: int
    begins_optimizer: bool


@dataclass(frozen=True)
class End:
    """Where the next line goes: behind so many bytes, after a line of this checksum."""

    length: int
    checksum: str


def entry(step: int, file: str, sha256: str, bytes: int, begins_optimizer: bool) -> Entry:
    """An entry as a file says it.

    Raises:
        ValueError, TypeError: it is none.
    """
    if not _FILE.fullmatch(file):
        raise ValueError(f"entry {step} names {file!r}, expected trajectory/NAME.h5")
    if int(step) < 0 or int(bytes) < 0:
        raise ValueError(f"entry {step} of {bytes} bytes, expected numbers that are not negative")
    return Entry(int(step), file, str(sha256), int(bytes), bool(begins_optimizer))


def write(folder: Path, entries: Iterable[Entry]) -> End:
    """Write an index anew, in one go.

    Raises:
        OSError: it could not be written; the one before it is untouched.
    """
    lines, checksum = _lines([{"schema_version": SCHEMA_VERSION}, *map(asdict, entries)], "")
    files.write_atomically(folder / INDEX, lines)
    return End(len(lines), checksum)


def append(folder: Path, added: Entry, end: End) -> End:
    """Add a line behind the end of an index, and say where it ends now.

    Raises:
        OSError: it could not be written; the index is as it was.
    """
    path = folder / INDEX
    line, checksum = _lines([asdict(added)], end.checksum)
    with files.explained(path, len(line)), path.open("r+b", buffering=0) as file:
        file.truncate(end.length)  # of what an append that failed could not take away
        file.seek(end.length)
        try:
            left = line
            while left:  # a disk that fills up takes a part first
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(end.length)
            raise
    return End(end.length + len(line), checksum)


def read(folder: Path) -> tuple[list[Entry], End | None]:
    """The entries of an index, and its end, unless it ends in a line that was cut short.

    Raises:
        TrajectoryError: it is missing, damaged, or not one that this version reads.
    """
    path, number, checksum = folder / INDEX, 0, ""
    found: list[Entry] = []
    try:
        data = files.read(path)
        lines = data.split(b"\n")
        if not _is_whole(lines[-1]):
            lines.pop()
        if not lines:
            raise ValueError("it is empty")
        for number, line in enumerate(lines, 1):
            document, checksum = files.unsealed(line, checksum)
            if number > 1:
                found.append(entry(**document))
            elif (version := int(document["schema_version"])) > SCHEMA_VERSION:
                raise TrajectoryError(
                    f"{path} has schema version {version}; this version reads up to {SCHEMA_VERSION}. "
                    "Update the package to read it."
                )
        if len({each.step for each in found}) < len(found):
            raise ValueError("two checkpoints are of one step")
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error}. Restore it from a copy.") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise TrajectoryError(
            f"{path} is damaged in line {number} ({type(error).__name__}: {error}). The checkpoints beside it may "
            "be well: restore it from a copy."
        ) from error
    return found, End(len(data), checksum) if data.endswith(b"\n") else None


def _lines(documents: Iterable[dict[str, Any]], checksum: str) -> tuple[bytes, str]:
    """Documents as lines that follow a line of this checksum, and the checksum of the last."""
    lines = b""
    for document in documents:
        line, checksum = files.sealed(json.dumps(document), checksum)
        lines += line + b"\n"
    return lines, checksum


def _is_whole(tail: bytes) -> bool:
    """Whether the text behind the last newline begins with a whole object: nothing that was cut short does."""
    try:
        json.JSONDecoder().raw_decode(tail.decode("latin-1"))
    except (ValueError, RecursionError):
        return False
    return True
