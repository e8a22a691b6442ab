"""The files of a run folder: written whole or not at all, their checksums in a manifest and an index.

    RUN/manifest.json                      config, provenance, checksums of the files beside it, and its own
    RUN/trajectory/index.jsonl             one line per checkpoint; see `checkpoints.index`
    RUN/trajectory/step-00000010.h5        checkpoints
    RUN/trajectory/shared/                 tensors that many of them hold; see `checkpoints.shared`

A checkpoint exists once the index names it. Other files in the folder are left alone. Runs of schema version 1,
whose manifest names the checkpoints and has no checksum of its own, are read; the first change renews them.
"""

import errno
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import files, index, values
from checkpoints.errors import TrajectoryError
from checkpoints.index import End, Entry
from checkpoints.shared import SHARED

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
TRAJECTORY = "trajectory"
LOCK = ".writer.lock"
ABSENT = ""
"""In place of a file's checksum where there may be none yet."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # as folders over a network may answer
_AGAIN = "Restore it from a copy, or call again what wrote it."
_FILE_BESIDE = re.compile(r"[\w-][\w.-]*")


@dataclass(frozen=True)
class Manifest:
    """What a run folder holds.

    Attributes:
        config, provenance: plain values.
        entries: the checkpoints, sorted by step.
        files: checksums of files beside the manifest, by name; two of one that is being replaced.
        n_checkpoints: how many there were when the manifest was written; an index that names fewer was cut short.
        end: where the next entry goes; None where the index must be written anew first.
        sealed: whether the manifest has a checksum, as all have since schema version 2.
    """

    config: dict[str, Any]
    provenance: dict[str, Any]
    entries: tuple[Entry, ...] = ()
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    n_checkpoints: int = 0
    end: End | None = None
    sealed: bool = True


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, be it without checkpoints, or checkpoints of a run whose manifest was lost."""
    return (folder / MANIFEST).exists() or holds_checkpoints(folder)


def holds_checkpoints(folder: Path) -> bool:
    """Whether a folder holds checkpoints of a run, also of one whose manifest was lost.

    Raises:
        TrajectoryError: there is a manifest that cannot be read.
    """
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        return bool(manifest.entries) or len(unnamed(folder, manifest)) > 1
    return any((folder / TRAJECTORY).glob("step-*.h5"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder.

    Raises:
        TrajectoryError: there is no folder, no manifest, or not one that this version reads.
    """
    path = folder / MANIFEST
    try:
        text = files.read(path)
        document = json.loads(text)
        version = int(document["schema_version"])
        if version > SCHEMA_VERSION:
            raise TrajectoryError(
                f"{path} has schema version {version}; this version reads up to {SCHEMA_VERSION}. "
                "Update the package to read it."
            )
        sealed = version > 1 or "sha256" in document
        if sealed:
            document, _ = files.unsealed(text)
            entries, end = index.read(folder)
            counted = int(document.get("n_checkpoints", 0))
            if len(entries) < counted:
                raise TrajectoryError(
                    f"{folder / index.INDEX} names {len(entries)} checkpoints, the manifest {counted} or more: it "
                    "has lost its end. The checkpoints beside it may be well: restore it from a copy."
                )
        else:
            entries, end = [index.entry(**each) for each in document["checkpoints"]], None
            counted = len(entries)
        return Manifest(
            config=dict(values.from_json(document["config"])),
            provenance=dict(values.from_json(document["provenance"])),
            entries=_sorted(entries),
            files={_beside(name): tuple(map(str, sums)) for name, sums in document.get("files", {}).items()},
            n_checkpoints=counted,
            end=end,
            sealed=sealed,
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        found = "it has no manifest.json" if folder.is_dir() else "there is no such folder"
        raise TrajectoryError(
            f"{str(folder)!r} is no run: {found}. A run is a folder with manifest.json and "
            "trajectory/step-*.h5, as TrajectoryWriter.create(folder, config) makes."
        ) from error
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError),
        *(ArithmeticError, RecursionError),
    ) as error:
        raise TrajectoryError(
            f"{path} is not a readable manifest ({type(error).__name__}: {error}); restore it from a copy. "
            "TrajectoryWriter.resume(folder).configure(config) changes a config, an editor does not."
        ) from error


def _sorted(entries: list[Entry]) -> tuple[Entry, ...]:
    """Entries by step, each step once."""
    found = {entry.step: entry for entry in entries}
    if len(found) < len(entries):
        raise ValueError("two checkpoints are of one step")
    return tuple(found[step] for step in sorted(found))


def _beside(name: str) -> str:
    if not _FILE_BESIDE.fullmatch(name):
        raise ValueError(f"{name!r} is listed, expected the name of a file beside the manifest")
    return name


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one go; the index stays as it is.

    Raises:
        TrajectoryError: config or provenance hold what JSON cannot say.
        OSError: it could not be written; the manifest before it is untouched.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "config": values.to_json(manifest.config, path=("config",)),
        "provenance": values.to_json(manifest.provenance, path=("provenance",)),
        "n_checkpoints": manifest.n_checkpoints,
        "files": {name: list(sums) for name, sums in manifest.files.items()},
    }
    text, _ = files.sealed(json.dumps(document, indent=1, allow_nan=False))
    files.write_atomically(folder / MANIFEST, text)


def write_checkpoint(folder: Path, step: int, image: bytes, begins_optimizer: bool) -> Entry:
    """Write one checkpoint file; it exists once the returned entry is appended to the index.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    file = f"{TRAJECTORY}/step-{step:08d}.h5"
    files.write_atomically(folder / file, image)
    return Entry(step, file, files.sha256(image), len(image), begins_optimizer)


def read_checkpoint(folder: Path, entry: Entry) -> bytes:
    """A checkpoint file's bytes.

    Raises:
        TrajectoryError: the file is missing, or is not the one that was written.
    """
    return files.read_checked(folder / entry.file, entry.bytes, entry.sha256, "the manifest")


def read_file(folder: Path, name: str) -> tuple[bytes, bool]:
    """The bytes of a file beside the manifest, and whether the manifest lists its checksum.

    Raises:
        TrajectoryError: it is missing, or not the one that was written.
    """
    path = folder / name
    for _ in range(2):  # again, as a writer may have replaced it between the two
        sums = read_manifest(folder).files.get(name)
        try:
            data = files.read(path)
        except OSError as error:
            raise TrajectoryError(f"{path} cannot be read: {error}. {_AGAIN}") from error
        if sums is None or files.sha256(data) in sums:
            return data, sums is not None
    raise TrajectoryError(
        f"{path} is damaged or was edited: its sha256 is not the one in the manifest. {_AGAIN}"
    )


def unnamed(folder: Path, manifest: Manifest) -> list[str]:
    """Checkpoint files that the index does not name: a killed writer leaves one, an index cut short more."""
    named = {entry.file for entry in manifest.entries}
    there = (f"{TRAJECTORY}/{path.name}" for path in (folder / TRAJECTORY).glob("step-*.h5"))
    return sorted(file for file in there if file not in named)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer was in the middle of; call it under the lock only."""
    for place in (folder, folder / TRAJECTORY, folder / SHARED):
        for partial in place.glob(f".*{files.PARTIAL}"):
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
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        logger.warning("%s has no locks (%s): see to it that nothing else writes there.", folder, error)
    except BaseException:
        os.close(descriptor)
        raise

    def release() -> None:
        with suppress(OSError):
            os.close(descriptor)

    return release
