"""Frozen weights and large buffers, stored once per trajectory and not once per checkpoint, as for LoRA.

    RUN/trajectory/shared/<sha256 of its bytes>     one tensor: its elements in row-major order, little-endian

A file's name is its checksum, so a tensor that many checkpoints hold is one file, and each of them names it. It
is durable before the first checkpoint that does; what a killed writer leaves is taken up by the next.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from checkpoints import files, values
from checkpoints.checkpoint import Checkpoint
from checkpoints.encoding import as_array
from checkpoints.errors import TrajectoryError

SHARED = "trajectory/shared"

_LEAST_BYTES = 4096  # a block of a disk: less would not be saved
_DIGEST = re.compile(r"[0-9a-f]{64}")


class SharedTensors:
    """What a writer has shared so far; a tensor that changed since is shared no more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[values.Path, str | None] = {}

    def store(self, checkpoint: Checkpoint) -> dict[values.Path, str]:
        """Store those of a checkpoint's tensors that may be shared, and say which: the checksums by path.

        Raises:
            TrajectoryError: one of them cannot be stored.
            OSError: it could not be written; nothing is left half written.
        """
        stored = {}
        for path, tensor in _lasting(checkpoint):
            if self._digests.get(path, "") is None:
                continue
            array = as_array(path, tensor)
            data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            digest = files.sha256(data)
            if path not in self._digests:
                _write(self._folder, digest, data)
            elif self._digests[path] != digest:
                self._digests[path] = None
                continue
            self._digests[path] = stored[path] = digest
        return stored


def _lasting(checkpoint: Checkpoint) -> Iterator[tuple[values.Path, Tensor]]:
    """The tensors that are worth sharing and may last: frozen parameters and buffers, such as causal masks."""
    for kind, named in (("parameters", checkpoint.parameters), ("buffers", checkpoint.buffers)):
        for name, tensor in named.items():
            lasts = kind == "buffers" or name in checkpoint.frozen
            if lasts and tensor.numel() * tensor.element_size() >= _LEAST_BYTES:
                yield (kind, name), tensor


def _write(folder: Path, digest: str, data: bytes) -> None:
    """Make sure that a tensor is there, whole and durable; one that is there already is read, and kept if well."""
    path = folder / SHARED / digest
    path.parent.mkdir(exist_ok=True)
    if path.exists() and files.read(path) == data:
        files.sync_folder(path.parent)
    else:
        files.write_atomically(path, data)


def read(folder: Path, digest: str, size: int) -> bytes:
    """The bytes of a shared tensor.

    Raises:
        TrajectoryError: it is missing, or is not the one that was written.
    """
    if not _DIGEST.fullmatch(digest):
        raise TrajectoryError(f"{digest!r} is named as a shared tensor, expected its sha256")
    return files.read_checked(folder / SHARED / digest, size, digest, "the checkpoint")


def damaged(folder: Path) -> list[str]:
    """The shared tensors that are not what was written, in words, whether a checkpoint names them or not."""
    return [
        f"{folder / name} is damaged: its sha256 is not its name. Restore it from a copy."
        for name in names(folder)
        if files.sha256(files.read(folder / name)) != (folder / name).name
    ]


def names(folder: Path) -> list[str]:
    """The files of shared tensors in a run folder, below it."""
    found = (path.name for path in (folder / SHARED).glob("*"))
    return sorted(f"{SHARED}/{name}" for name in found if _DIGEST.fullmatch(name))
