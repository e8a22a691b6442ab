"""The ordered checkpoints of a run: `Trajectory` reads them lazily, `TrajectoryWriter` adds to them."""

import bisect
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from checkpoints import encoding, store, values
from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import TrajectoryError


class Trajectory:
    """The checkpoints of one run folder as its manifest named them when it was opened.

    Nothing but the manifest is read until a checkpoint is asked for. A file's checksum is verified the first
    time it is read. Open again to see what a writer has added since.
    """

    def __init__(self, path: Path, manifest: store.Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._entries = {entry.step: entry for entry in manifest.entries}
        self._steps = tuple(self._entries)
        self._verified: set[int] = set()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Trajectory":
        """Open a run folder.

        Raises:
            TrajectoryError: the folder holds no run, or one that this version cannot read.
        """
        path = Path(folder)
        return cls(path, store.read_manifest(path))

    def __repr__(self) -> str:
        span = f", steps {self._steps[0]} to {self._steps[-1]}" if self._steps else ""
        return f"Trajectory({str(self._path)!r}, {len(self)} checkpoints{span})"

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._path

    @property
    def steps(self) -> tuple[int, ...]:
        """The stored steps in rising order."""
        return self._steps

    @property
    def optimizer_starts(self) -> tuple[int, ...]:
        """The stored steps at which training began with a new optimizer."""
        return tuple(entry.step for entry in self._manifest.entries if entry.begins_optimizer)

    @property
    def config(self) -> dict[str, Any]:
        """The run's config (a copy)."""
        return dict(values.copied(self._manifest.config))

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the run came from: versions, commit and the like (a copy)."""
        return dict(values.copied(self._manifest.provenance))

    @property
    def last(self) -> Checkpoint:
        """The checkpoint of the highest step.

        Raises:
            TrajectoryError: there are no checkpoints, or the file is damaged.
        """
        self._check_not_empty()
        return self.at(self._steps[-1])

    def at(self, step: int) -> Checkpoint:
        """The checkpoint stored at exactly this step, its tensors on the CPU.

        Raises:
            TrajectoryError: the step is not stored (the message lists those around), or the file is damaged.
        """
        entry = self._entry(step)
        image = store.read_checkpoint(self._path, entry)
        self._verified.add(step)
        checkpoint = encoding.decode(image, str(self._path / entry.file))
        if checkpoint.step != step:
            raise TrajectoryError(
                f"{self._path / entry.file} holds step {checkpoint.step}, the manifest says {step}"
            )
        return checkpoint

    def nearest(self, step: int) -> Checkpoint:
        """The stored checkpoint closest to a step; of two equally close ones the earlier.

        Raises:
            TrajectoryError: there are no checkpoints, or the file is damaged.
        """
        self._check_not_empty()
        return self.at(min(self._steps, key=lambda stored: abs(stored - step)))

    def before(self, step: int) -> Checkpoint:
        """The latest stored checkpoint at this step or before it: where a replay to `step` sets out.

        Raises:
            TrajectoryError: nothing is stored that early, or the file is damaged.
        """
        self._check_not_empty()
        i = bisect.bisect_right(self._steps, step)
        if i == 0:
            raise TrajectoryError(
                f"{str(self._path)!r} has no checkpoint at step {step} or before; "
                f"its first is {self._steps[0]}"
            )
        return self.at(self._steps[i - 1])

    def tensor(self, step: int, name: str, kind: str = "parameters") -> Tensor:
        """One tensor of one checkpoint, read without the others.

        Args:
            step: a stored step.
            name: the parameter's or buffer's name.
            kind: `parameters`, `buffers`, or what the optimizer keeps for a parameter, such as `exp_avg`.

        Raises:
            TrajectoryError: no such step or tensor (the message lists what there is), or the file is damaged.
        """
        entry = self._entry(step)
        if step not in self._verified:
            store.read_checkpoint(self._path, entry)
            self._verified.add(step)
        return encoding.read_tensor(self._path / entry.file, name, kind)

    def verify(self) -> list[str]:
        """Read every checkpoint whole and say what is wrong with which; empty when all is well."""
        problems = []
        for step in self._steps:
            try:
                self.at(step)
            except TrajectoryError as error:
                problems.append(f"step {step}: {error}")
        return problems

    def _check_not_empty(self) -> None:
        if not self._steps:
            raise TrajectoryError(f"{str(self._path)!r} is a run without checkpoints: none was written yet")

    def _entry(self, step: int) -> store.Entry:
        if step in self._entries:
            return self._entries[step]
        self._check_not_empty()
        i = bisect.bisect_left(self._steps, step)
        around = ", ".join(str(stored) for stored in self._steps[max(0, i - 2) : i + 2])
        raise TrajectoryError(
            f"Step {step} is not stored in {str(self._path)!r}; the nearest that are: {around}. "
            f".steps lists all {len(self)}, .nearest({step}) takes the closest."
        )


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
            if store.holds_run(path):
                raise TrajectoryError(
                    f"{str(path)!r} already holds a run, which is never overwritten. Continue it with "
                    "TrajectoryWriter.resume(folder), or choose another folder."
                )
            (path / store.TRAJECTORY).mkdir(exist_ok=True)
            self._replace_manifest(store.Manifest(values.copied(config), values.copied(provenance or {}), ()))
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
            writer._manifest = store.read_manifest(path)
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
        return tuple(entry.step for entry in self._manifest.entries)

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
        if checkpoint.step in self.steps:
            self._check_same(checkpoint)
            return
        entry = store.write_checkpoint(
            self._path, checkpoint.step, encoding.encode(checkpoint), checkpoint.begins_optimizer
        )
        entries = sorted((*self._manifest.entries, entry), key=lambda each: each.step)
        self._replace_manifest(replace(self._manifest, entries=tuple(entries)))

    def configure(self, config: dict[str, Any]) -> None:
        """Replace the run's config.

        Raises:
            TrajectoryError: config is not plain, or the writer is closed.
            OSError: it could not be written; the run is as it was.
        """
        self._check_open()
        self._replace_manifest(replace(self._manifest, config=values.copied(config)))

    def close(self) -> None:
        """Let other writers in. Closing twice is harmless."""
        if self._open:
            self._open = False
            self._release()

    def _lock(self, folder: str | os.PathLike[str]) -> Path:
        self._path = Path(folder)
        self._path.mkdir(parents=True, exist_ok=True)
        self._release = store.lock(self._path)
        self._open = True
        return self._path

    def _replace_manifest(self, manifest: store.Manifest) -> None:
        store.write_manifest(self._path, manifest)
        self._manifest = manifest

    def _check_open(self) -> None:
        if not self._open:
            raise TrajectoryError(
                f"The writer of {str(self._path)!r} is closed; TrajectoryWriter.resume(folder) opens another."
            )

    def _check_same(self, checkpoint: Checkpoint) -> None:
        stored = Trajectory(self._path, self._manifest).at(checkpoint.step)
        different = stored.differences(checkpoint) + stored.rng_differences(checkpoint)
        if different:
            raise TrajectoryError(
                f"Step {checkpoint.step} is already stored in {str(self._path)!r} and differs in "
                f"{len(different)} places, first {', '.join(different[:3])}. Stored checkpoints are never "
                "overwritten: write to another folder, or append other steps."
            )
