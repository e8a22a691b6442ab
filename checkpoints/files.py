"""Files that are there whole or not at all, and JSON that ends with its own checksum.

A sealed document is a JSON object whose last key, `sha256`, is the checksum of all that stands before it, and,
where several stand in one file, of the one before: none can be changed, left out or moved unnoticed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from checkpoints.errors import TrajectoryError

PARTIAL = ".partial"

_NEXT = "Restore it from a copy; the run's other checkpoints can still be read."
_SEAL = ', "sha256": "'


def sha256(data: bytes) -> str:
    """The checksum of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sealed(document: str, before: str = "") -> tuple[bytes, str]:
    """A JSON object with its checksum, and the checksum, which is the `before` of what comes next."""
    body = document.removesuffix("}").rstrip()
    checksum = sha256(f"{before}{body}".encode("ascii"))
    return f'{body}{_SEAL}{checksum}"}}'.encode("ascii"), checksum


def unsealed(text: bytes, before: str = "") -> tuple[dict[str, Any], str]:
    """The object that was sealed, and its checksum.

    Raises:
        ValueError: it is not what was sealed, or does not follow `before`.
    """
    body = text[: -(len(_SEAL) + 66)]
    checksum = sha256(before.encode("ascii") + body)
    if text != body + f'{_SEAL}{checksum}"}}'.encode("ascii"):
        raise ValueError("its sha256 is not that of its contents")
    document = json.loads(body + b"}")
    return document, checksum


def plain(path: Path) -> Path:
    """The path of a plain file, or of none; of anything else, such as a pipe that would never end, an OSError."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no plain file")
    return path


def read(path: Path) -> bytes:
    """A plain file's bytes."""
    return plain(path).read_bytes()


def read_checked(path: Path, size: int, checksum: str, named_by: str) -> bytes:
    """A file's bytes, which are of this size and have this checksum.

    Raises:
        TrajectoryError: it is missing, or is not the one that was written.
    """
    try:
        found = path.stat().st_size
        data = read(path) if found == size else b""
    except OSError as error:
        raise TrajectoryError(f"{path}, named by {named_by}, cannot be read: {error}. {_NEXT}") from error
    if found != size:
        raise TrajectoryError(f"{path} is damaged: {found} bytes, {named_by} says {size}. {_NEXT}")
    if sha256(data) != checksum:
        raise TrajectoryError(f"{path} is damaged: its sha256 is not the one in {named_by}. {_NEXT}")
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole and durable, or not there (or still the old one).

    Raises:
        OSError: as from the system, for example a full disk; says what was to be written and what is free.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
    with explained(path, len(data)):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a loss of power."""
    if os.name == "nt":
        return  # Windows has no handle to sync on a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path, size: int | None = None) -> Iterator[None]:
    """Where writing fails inside, the same error says which file, how large, how much room is left, what to do."""
    try:
        yield
    except OSError as error:
        free = next((shutil.disk_usage(p).free for p in path.absolute().parents if p.is_dir()), 0)
        to_write = "" if size is None else f" {size:,} bytes were to be written;"
        words = (
            f"{path} was not written.{to_write} {free:,} bytes are free on its disk. What was there before is "
            "untouched: make room, or see that the folder may be written to, and do it again"
        )
        if error.errno is None:  # not the system's own
            error.add_note(words)
            raise
        raise OSError(error.errno, f"{os.strerror(error.errno)}: {words}") from error
