"""Disks that fill up, files that vanish, folders that may not be read or written."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

import dynamics as dy
from checkpoints import Trajectory, TrajectoryError, TrajectoryWriter
from scripts.benchmarks.torture_rows.recordings import a_run, effects, opened, state
from scripts.benchmarks.torture_rows.trials import forked

NOBODY = 65534
_NEW_MOUNTS, _NEW_USER, _PRIVATE = 0x00020000, 0x10000000, 0x00040000 | 0x4000
_READ_ONLY = 0x20 | 0x1


def quota(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """No room for a file (a quota): the error names the file and what is free, what was finished verifies"""
    run = a_run(folder)

    def short_of_room(room: int) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return explained(partial(append_one, run), run)

    for _ in range(n):
        outcome = forked(partial(short_of_room, int(rng.integers(1, 20_000))))
        yield (
            outcome
            if outcome[:6] == "BROKEN"
            else forked(partial(opened, run, 2)).replace("opens whole", outcome)
        )


def append_one(run: Path) -> None:
    with TrajectoryWriter.resume(run) as writer:
        writer.append(state(len(writer.steps)))


def write_one(run: Path) -> None:
    with TrajectoryWriter.resume(run) as writer:
        writer.write_file("notes.txt", b"mine")


def explained(work: Callable[[], object], run: Path) -> str:
    """Whether writing ends with an error that names a file of the run and what is free."""
    try:
        work()
    except OSError as error:
        told = str(run) in str(error) and "bytes are free" in str(error)
        return "an error that names file and room" if told else f"BROKEN: {error}"
    return "BROKEN: no error"


def full(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """A disk that is full, then has room again: the error names the file, what was finished verifies, it goes on"""

    def fill(room: int, seed: int) -> str:
        if not mounted(folder, room):
            return "no disk could be mounted to fill up"
        run, random = folder / "run", np.random.default_rng(seed)
        TrajectoryWriter.create(run, {}).close()
        (folder / "ballast").write_bytes(b"x" * 60_000)
        append_until_full = partial(append_many, run)
        if (outcome := explained(append_until_full, run)).startswith("BROKEN"):
            return outcome
        writes = {
            "write_file": lambda writer: writer.write_file("metrics.csv", random.bytes(200_000)),
            "configure": lambda writer: writer.configure({"notes": "x" * 200_000}),
            "save": lambda writer: dy.results.save(
                effects().isel(site=[0] * 2_000), run / "results" / "x.h5"
            ),
        }
        for name, write in writes.items():
            with TrajectoryWriter.resume(run) as writer:
                if (outcome := explained(partial(write, writer), run)).startswith("BROKEN"):
                    return f"BROKEN in {name}{outcome[6:]}"
        finished = len(Trajectory.open(run)) - 1
        if (outcome := opened(run, finished)) != "opens whole":
            return outcome
        (folder / "ballast").unlink()
        append_one(run)
        return opened(run, finished + 1).replace("opens whole", "explained, whole, and goes on with room")

    folder.mkdir()
    for _ in range(n):
        yield forked(partial(fill, int(rng.integers(200_000, 600_000)), int(rng.integers(1 << 30))))


def append_many(run: Path) -> None:
    with TrajectoryWriter.resume(run) as writer:
        for step in range(100):
            writer.append(state(step))


def mounted(folder: Path, room: int) -> bool:
    """Put a small disk in place of a folder, for this process alone; False where that is not permitted."""
    libc, no_data = ctypes.CDLL(None, use_errno=True), ctypes.c_char_p()
    own_user, user, group = os.geteuid() != 0, os.geteuid(), os.getegid()
    if libc.unshare(_NEW_MOUNTS | (_NEW_USER if own_user else 0)):
        return False
    if own_user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", b"/", no_data, ctypes.c_ulong(_PRIVATE), no_data):
        return False
    size = f"size={room}".encode()
    return not libc.mount(b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), size)


def denied(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Permission taken away, a disk made read-only: an error that names the file; read on, and go on once given"""

    def without(path: Path, run: Path, write: Callable[[Path], object]) -> str:
        as_nobody()
        path.chmod(0o500)
        try:
            write(run)
            return "BROKEN: no error"
        except OSError as error:
            if str(run) not in str(error):
                return f"BROKEN: {error}"
        if (outcome := opened(run, 2)) != "opens whole":
            return outcome
        path.chmod(0o700)
        append_one(run)
        return opened(run, 3).replace("opens whole", "named, read on, gone on with")

    def unreadable(path: Path, read: Callable[[], object]) -> str:
        as_nobody()
        path.chmod(0)
        return named_as_gone(read, path)

    def read_only(room: int) -> str:
        if not mounted(folder, room):
            return "no disk could be mounted to be read only"
        run = a_run(folder / "run")
        if ctypes.CDLL(None).mount(
            b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(_READ_ONLY), ctypes.c_char_p()
        ):
            return "no disk could be made read only"
        try:
            append_one(run)
            return "BROKEN: no error"
        except OSError as error:
            return (
                opened(run, 2).replace("opens whole", "named, read on")
                if str(run) in str(error)
                else f"BROKEN: {error}"
            )

    folder.mkdir()
    for place in (folder, folder.parent):
        place.chmod(0o711)
    for trial in range(n):
        for which, write in {"trajectory": append_one, ".": write_one}.items():
            run = owned_by_nobody(a_run(folder / f"run-{trial}-{which.strip('.')}"))
            yield forked(partial(without, run / which, run, write))
        run = owned_by_nobody(a_run(folder / f"unreadable-{trial}"))
        for path, read in reads(run).items():
            yield forked(partial(unreadable, path, read))
            path.chmod(0o600)
        yield forked(partial(read_only, 2_000_000))


def as_nobody() -> None:
    """Whom permissions hold for: root is asked for none."""
    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)


def owned_by_nobody(run: Path) -> Path:
    if os.geteuid() == 0:
        for path in (run, *run.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    return run


def reads(run: Path) -> dict[Path, Callable[[], object]]:
    """Each kind of file of a run, and what reads it."""
    return {
        run / "trajectory/step-00000001.h5": lambda: Trajectory.open(run).at(1),
        run / "trajectory/index.jsonl": lambda: Trajectory.open(run),
        run / "manifest.json": lambda: Trajectory.open(run),
        run / "metrics.csv": lambda: Trajectory.open(run).read_file("metrics.csv"),
        run / "results/effects.h5": lambda: dy.results.load(run / "results/effects.h5"),
    }


def vanishing(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Files and folders that vanish: each read names what is gone, a writer's error too, and the rest verifies"""

    def folder_gone() -> str:
        lost = a_run(folder / f"vanishing-{os.getpid()}")
        with TrajectoryWriter.resume(lost) as writer:
            (lost / "trajectory").rename(lost / "moved")
            try:
                writer.append(state(9))
            except OSError as error:
                (lost / "moved").rename(lost / "trajectory")
                return opened(lost, 2) if str(lost) in str(error) else f"BROKEN: {error}"
        return "BROKEN: no error"

    def file_gone(run: Path, path: Path, read: Callable[[], object]) -> str:
        path.unlink()
        return named_as_gone(read, path)

    folder.mkdir()
    run = a_run(folder / "run")
    for _ in range(n):
        yield forked(folder_gone)
        for path, read in reads(run).items():
            shutil.copy(path, folder / "kept")
            yield forked(partial(file_gone, run, path, read))
            shutil.copy(folder / "kept", path)
        yield forked(partial(opened, run, 2))


def named_as_gone(read: Callable[[], object], path: Path) -> str:
    """Whether a read of a file that is not there, or may not be read, ends with an error that names it."""
    try:
        read()
    except (TrajectoryError, dy.results.ResultsError, OSError) as error:
        return "named as gone" if path.name in str(error) else f"BROKEN: {path.name} is not named by {error}"
    return "BROKEN: silent"
