"""The files of a run folder: written whole or not at all, named with their checksums in a manifest.

    RUN/manifest.json                      config, provenance, and one entry per checkpoint
    RUN/trajectory/step-00000010.h5        checkpoints

A checkpoint exists once the manifest names it. Other files in the folder are left alone.
"""

import hashlib
import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints import values
from checkpoints.errors import TrajectoryError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TRAJECTORY = "trajectory"
LOCK = ".writer.lock"

_PARTIAL = ".partial"
_ENTRY_FILE = re.compile(r"trajectory/[\w-][\w.-]*\.h5")


@dataclass(frozen=True)
class Entry:
    """One checkpoint file: its path below the run folder, and what it must be."""

    step: int
    file: str
    sha256: str
    bytes: int
    begins_optimizer: bool


@dataclass(frozen=True)
class Manifest:
    """What a run folder holds; `entries` are sorted by step."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    entries: tuple[Entry, ...]


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, be it without checkpoints, or checkpoints of a run whose manifest was lost."""
    return (folder / MANIFEST).exists() or holds_checkpoints(folder)


def holds_checkpoints(folder: Path) -> bool:
    """Whether a folder holds checkpoints of a run, also of one whose manifest was lost.

    Raises:
        TrajectoryError: there is a manifest that cannot be read.
    """
    if (folder / MANIFEST).exists():
        return bool(read_manifest(folder).entries)
    return any((folder / TRAJECTORY).glob("step-*.h5"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder.

    Raises:
        TrajectoryError: there is no folder, no manifest, or not one that this version reads.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_bytes())
        version = int(document["schema_version"])
        if version > SCHEMA_VERSION:
            raise TrajectoryError(
                f"{path} has schema version {version}; this version reads up to {SCHEMA_VERSION}. "
                "Update the package to read it."
            )
        return Manifest(
            config=dict(values.from_json(document["config"])),
            provenance=dict(values.from_json(document["provenance"])),
            entries=tuple(
                sorted((_entry(**entry) for entry in document["checkpoints"]), key=lambda e: e.step)
            ),
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        found = "it has no manifest.json" if folder.is_dir() else "there is no such folder"
        raise TrajectoryError(
            f"{str(folder)!r} is no run: {found}. A run is a folder with manifest.json and "
            "trajectory/step-*.h5, as TrajectoryWriter.create(folder, config) makes."
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrajectoryError(
            f"{path} is not a readable manifest ({type(error).__name__}: {error}); restore it from a copy"
        ) from error


def _entry(step: int, file: str, sha256: str, bytes: int, begins_optimizer: bool) -> Entry:
    if not _ENTRY_FILE.fullmatch(file):
        raise ValueError(f"entry {step} names {file!r}, expected trajectory/NAME.h5")
    return Entry(int(step), file, str(sha256), int(bytes), bool(begins_optimizer))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one go.

    Raises:
        TrajectoryError: config or provenance hold what JSON cannot say.
        OSError: it could not be written; the manifest before it is untouched.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "config": values.to_json(manifest.config, path=("config",)),
        "provenance": values.to_json(manifest.provenance, path=("provenance",)),
        "checkpoints": [asdict(entry) for entry in manifest.entries],
    }
    write_atomically(folder / MANIFEST, json.dumps(document, indent=1, allow_nan=False).encode("ascii"))


def write_checkpoint(folder: Path, step: int, image: bytes, begins_optimizer: bool) -> Entry:
    """Write one checkpoint file; it exists once a manifest with the returned entry is written.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    file = f"{TRAJECTORY}/step-{step:08d}.h5"
    write_atomically(folder / file, image)
    return Entry(step, file, hashlib.sha256(image).hexdigest(), len(image), begins_optimizer)


def read_checkpoint(folder: Path, entry: Entry) -> bytes:
    """A checkpoint file's bytes.

    Raises:
        TrajectoryError: the file is missing, or is not the one that was written.
    """
    path = folder / entry.file
    try:
        image = path.read_bytes()
    except OSError as error:
        raise TrajectoryError(
            f"{path}, named by the manifest for step {entry.step}, cannot be read: {error}"
        ) from error
    if len(image) != entry.bytes:
        raise TrajectoryError(f"{path} is damaged: {len(image)} bytes, the manifest says {entry.bytes}")
    if hashlib.sha256(image).hexdigest() != entry.sha256:
        raise TrajectoryError(f"{path} is damaged: its sha256 is not the one in the manifest")
    return image


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole and durable, or not there (or still the old one).

    Raises:
        OSError: as from the system, for example a full disk.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer was in the middle of; call it under the lock only."""
    for pattern in (f".{MANIFEST}.*{_PARTIAL}", f"{TRAJECTORY}/.step-*.h5.*{_PARTIAL}"):
        for partial in folder.glob(pattern):
            partial.unlink(missing_ok=True)


def lock(folder: Path) -> Callable[[], None]:
    """Keep other writers out of a run folder until the returned function is called or this process ends.

    Raises:
        TrajectoryError: another writer has it; the message says which.
    """
    import fcntl  # here, so that runs can be read where there is none

    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BlockingIOError as error:
        other = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise TrajectoryError(
            f"{str(folder)!r} is being written by {other}. Wait for it or end it, or write to another folder."
        ) from error
    except BaseException:
        os.close(descriptor)
        raise

    def release() -> None:
        with suppress(OSError):
            os.close(descriptor)

    return release
