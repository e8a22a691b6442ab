"""Adding checkpoints to a run folder, one writer at a time."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from checkpoints import encoding, files, index, shared, store, values
from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import TrajectoryError
from checkpoints.index import End, Entry
from checkpoints.shared import SharedTensors


class TrajectoryWriter:
    """Adds checkpoints to a run folder; a context manager that keeps other writers out meanwhile.

    Every change is whole and durable when its call returns: a process killed at any moment, or a full disk,
    leaves the run as it was after the last finished call.
    """

    _open: bool

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: dict[str, Any],
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """Begin a new run; see `create`."""
        path = self._lock(folder)
        try:
            if store.holds_checkpoints(path):
                raise TrajectoryError(
                    f"{str(path)!r} already holds a run, which is never overwritten. Continue it with "
                    "TrajectoryWriter.resume(folder), or choose another folder."
                )
            (path / store.TRAJECTORY).mkdir(exist_ok=True)
            manifest = store.Manifest(values.copied(config), values.copied(provenance or {}))
            self._entries: dict[int, Entry] = {}
            self._end: End | None = index.write(path, ())
            self._replace_manifest(manifest)
        except BaseException:
            self._release()
            raise

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        config: dict[str, Any],
        provenance: dict[str, Any] | None = None,
    ) -> "TrajectoryWriter":
        """Begin a new run in a folder, which is made where there is none and may hold other files.

        A run that was begun there and never came to a checkpoint gives way.

        Args:
            folder: the run folder.
            config: what the run can be rebuilt from: plain values (dicts, lists, tuples, numbers, text).
            provenance: plain values: versions, commit, command and the like.

        Raises:
            TrajectoryError: the folder holds a run already, is being written, or config is not plain.
            OSError: the folder cannot be written.
        """
        return cls(folder, config, provenance)

    @classmethod
    def resume(cls, folder: str | os.PathLike[str]) -> "TrajectoryWriter":
        """Continue the run in a folder; what a killed writer left half written is removed.

        Raises:
            TrajectoryError: the folder holds no run, or is being written.
        """
        store.read_manifest(
            Path(folder)
        )  # before the lock, which would leave a file in a folder that is no run
        writer = cls.__new__(cls)
        path = writer._lock(folder)
        try:
            store.remove_leftovers(path)
            (path / store.TRAJECTORY).mkdir(exist_ok=True)
            writer._manifest = manifest = store.read_manifest(path)
            writer._entries, writer._end = {entry.step: entry for entry in manifest.entries}, manifest.end
        except BaseException:
            writer._release()
            raise
        return writer

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._path

    @property
    def steps(self) -> tuple[int, ...]:
        """The stored steps in rising order."""
        return tuple(sorted(self._entries))

    @property
    def config(self) -> dict[str, Any]:
        """The run's config (a copy)."""
        return dict(values.copied(self._manifest.config))

    def append(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint; one that is stored already, bit for bit and with its RNG, is left as it is.

        Raises:
            TrajectoryError: the step is stored with other contents, something in the checkpoint cannot be
                stored, or the writer is closed.
            OSError: it could not be written; the run is as it was.
        """
        self._check_open()
        if checkpoint.step in self._entries:
            self._check_same(checkpoint)
            return
        image = encoding.encode(checkpoint, self._shared.store(checkpoint))
        entry = store.write_checkpoint(self._path, checkpoint.step, image, checkpoint.begins_optimizer)
        self._end = index.append(self._path, entry, self._end or self._index_anew())
        self._entries[entry.step] = entry

    def configure(self, config: dict[str, Any]) -> None:
        """Replace the run's config.

        Raises:
            TrajectoryError: config is not plain, or the writer is closed.
            OSError: it could not be written; the run is as it was.
        """
        self._check_open()
        self._end = self._end or self._index_anew()
        self._replace_manifest(replace(self._manifest, config=values.copied(config)))

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file beside the checkpoints, whole or not at all, and list its checksum.

        While it is replaced the manifest lists both checksums, so that the run is well at every moment.

        Args:
            name: of the file, without a folder.
            data: its bytes.

        Raises:
            OSError: it could not be written; the file is as it was.
        """
        self._check_open()
        listed, checksum = self._manifest.files, files.sha256(data)
        before = listed.get(name, (store.ABSENT,))
        if before != (checksum,):
            self._list({**listed, name: (*before, checksum)})
        files.write_atomically(self._path / name, data)
        if before != (checksum,):
            self._list({**listed, name: (checksum,)})

    def close(self) -> None:
        """Count the checkpoints in the manifest and let other writers in. Closing twice is harmless."""
        if self._open:
            self._open = False
            try:
                if len(self._entries) > self._manifest.n_checkpoints:
                    with suppress(
                        OSError
                    ):  # each append is durable by itself: a full disk costs this count alone
                        self._replace_manifest(self._manifest)
            finally:
                self._release()

    def _lock(self, folder: str | os.PathLike[str]) -> Path:
        self._path = Path(folder)
        self._path.mkdir(parents=True, exist_ok=True)
        self._release = store.lock(self._path)
        self._shared = SharedTensors(self._path)
        self._open = True
        return self._path

    def _index_anew(self) -> End:
        """An index that can be appended to, in place of one that was cut short, or of an older manifest's."""
        end = index.write(self._path, self._entries.values())
        if not self._manifest.sealed:
            self._replace_manifest(replace(self._manifest, sealed=True))
        return end

    def _list(self, listed: Mapping[str, tuple[str, ...]]) -> None:
        self._end = self._end or self._index_anew()
        self._replace_manifest(replace(self._manifest, files=listed))

    def _replace_manifest(self, manifest: store.Manifest) -> None:
        manifest = replace(manifest, n_checkpoints=len(self._entries))
        store.write_manifest(self._path, manifest)
        self._manifest = manifest

    def _check_open(self) -> None:
        if not self._open:
            raise TrajectoryError(
                f"The writer of {str(self._path)!r} is closed; TrajectoryWriter.resume(folder) opens another."
            )

    def _check_same(self, checkpoint: Checkpoint) -> None:
        entry = self._entries[checkpoint.step]
        stored = encoding.decode(
            store.read_checkpoint(self._path, entry),
            str(self._path / entry.file),
            partial(shared.read, self._path),
        )
        different = stored.differences(checkpoint) + stored.rng_differences(checkpoint)
        if different:
            raise TrajectoryError(
                f"Step {checkpoint.step} is already stored in {str(self._path)!r} and differs in "
                f"{len(different)} places, first {', '.join(different[:3])}. Stored checkpoints are never "
                "overwritten: write to another folder, or append other steps."
            )
