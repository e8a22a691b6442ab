"""Writing a run: nothing is overwritten, and neither kills nor a full disk do harm."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints import Trajectory, TrajectoryError, TrajectoryWriter


def test_configure_replaces_the_config_and_keeps_the_checkpoints(run):
    with TrajectoryWriter.resume(run) as writer:
        writer.configure({"seed": 9})
        with pytest.raises(TrajectoryError, match="config/path is a PosixPath"):
            writer.configure({"path": run})
        with pytest.raises(TrajectoryError, match="config/w is a tensor"):
            writer.configure({"w": torch.zeros(1)})
    trajectory = Trajectory.open(run)
    assert trajectory.config == {"seed": 9}
    assert trajectory.steps == (0, 10, 20)


def test_nothing_is_overwritten(run, files):
    before = {name: (run / name).read_bytes() for name in files(run) if name != ".writer.lock"}
    with pytest.raises(TrajectoryError, match="already holds a run, which is never overwritten"):
        TrajectoryWriter.create(run, {})
    with TrajectoryWriter.resume(run) as writer:
        stored = Trajectory.open(run).at(10)
        writer.append(stored)
        changed = replace(stored, buffers={**stored.buffers, "scale": torch.tensor(-2.0)})
        with pytest.raises(TrajectoryError, match=r"Step 10 is already stored .* first buffers/scale"):
            writer.append(changed)
        with pytest.raises(TrajectoryError, match="rng"):
            writer.append(replace(stored, rng=None))
    assert before == {name: (run / name).read_bytes() for name in before}
    (run / "manifest.json").unlink()
    with pytest.raises(TrajectoryError, match="already holds a run"):
        TrajectoryWriter.create(run, {})


def test_a_second_writer_is_refused_until_the_first_is_done(run, small):
    with TrajectoryWriter.resume(run):
        with pytest.raises(TrajectoryError, match=f"is being written by process {os.getpid()} on "):
            TrajectoryWriter.resume(run)
        with pytest.raises(TrajectoryError, match="is being written by process"):
            TrajectoryWriter.create(run, {})
    with TrajectoryWriter.resume(run) as writer:
        writer.append(small(30))
    writer.close()
    with pytest.raises(TrajectoryError, match="is closed"):
        writer.append(small(40))


def test_a_writer_that_fails_to_begin_leaves_no_lock(run):
    with pytest.raises(TrajectoryError):
        TrajectoryWriter.create(run, {})
    TrajectoryWriter.resume(run).close()


class FullFile:
    """A file on a disk that fills up half way through."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("file", "operation"),
    [
        *(("step-00000030.h5", operation) for operation in ("write", "fsync", "replace")),
        *(("index.jsonl", operation) for operation in ("write", "fsync")),
    ],
)
def test_a_full_disk_is_an_os_error_and_leaves_the_run_valid(run, monkeypatch, file, operation, small, files):
    current = []
    real_open, real_fsync, real_replace = Path.open, os.fsync, os.replace

    def fails():
        return file in current[-1]

    def full_open(path, mode="r", *args, **kwargs):
        current.append(path.name)
        opened = real_open(path, mode, *args, **kwargs)
        return FullFile(opened) if mode != "r" and operation == "write" and fails() else opened

    def full_fsync(descriptor):
        if operation == "fsync" and fails():
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    def full_replace(source, target):
        if operation == "replace" and fails():
            raise OSError(errno.ENOSPC, "No space left on device")
        real_replace(source, target)

    with TrajectoryWriter.resume(run) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full_open)
            patch.setattr(os, "fsync", full_fsync)
            patch.setattr(os, "replace", full_replace)
            with pytest.raises(OSError, match="No space left") as raised:
                writer.append(small(30))
            assert raised.value.errno == errno.ENOSPC
            assert file in str(raised.value)
            assert "bytes are free" in str(raised.value)
        assert Trajectory.open(run).steps == (0, 10, 20)
        assert Trajectory.open(run).verify() == []
        assert not [name for name in files(run) if name.endswith(".partial")]
        writer.append(small(30))  # there is room again
    assert Trajectory.open(run).steps == (0, 10, 20, 30)
    assert Trajectory.open(run).verify() == []


def test_leftovers_of_a_killed_writer_are_removed_and_other_files_kept(run):
    leftovers = [run / ".manifest.json.77.partial", run / "trajectory/.step-00000030.h5.77.partial"]
    kept = run / "download.partial"
    for path in [*leftovers, kept]:
        path.write_bytes(b"half")
    TrajectoryWriter.resume(run).close()
    assert not any(path.exists() for path in leftovers)
    assert kept.exists()


WRITERS = """
import os, sys, torch
from dataclasses import replace
from checkpoints import Checkpoint, TrajectoryWriter

def write_forever():
    with TrajectoryWriter.resume(sys.argv[1]) as writer:
        empty = Checkpoint.capture(torch.nn.Module())
        step = first = max(writer.steps, default=-1) + 1
        while True:
            writer.append(replace(empty, step=step, parameters={"w": torch.full((50_000,), float(step))}))
            if step == first:
                print(os.getpid(), flush=True)
            step += 1

for _ in sys.stdin:
    if (writer := os.fork()) == 0:
        write_forever()
    print(os.waitpid(writer, 0)[1], flush=True)
"""
"""For every line a process that writes until it is killed: its number once it wrote, and what ended it."""


@pytest.mark.slow
def test_a_killed_writer_leaves_a_run_that_opens_verifies_and_resumes(tmp_path, small, files):
    TrajectoryWriter.create(tmp_path, {}).close()
    n_before = 0
    command, pipes = [sys.executable, "-c", WRITERS, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipes, stdout=pipes, text=True, bufsize=1) as writers:
        for kill in range(6):
            writers.stdin.write("\n")
            writer = int(writers.stdout.readline())
            time.sleep(0.1 + 0.037 * kill)
            if kill == 0:
                with pytest.raises(TrajectoryError, match=f"is being written by process {writer} on "):
                    TrajectoryWriter.resume(tmp_path)
            os.kill(writer, signal.SIGKILL)
            assert int(writers.stdout.readline()) == signal.SIGKILL
            trajectory = Trajectory.open(tmp_path)
            assert trajectory.verify() == []
            assert len(trajectory) > n_before
            assert trajectory.steps == tuple(range(len(trajectory)))
            assert trajectory.last.parameters["w"][0] == len(trajectory) - 1
            n_before = len(trajectory)
    with TrajectoryWriter.resume(tmp_path) as writer:
        writer.append(small(n_before))
    assert not [name for name in files(tmp_path) if name.endswith(".partial")]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_folder_without_locks_is_written_and_the_log_says_so(run, small, monkeypatch, caplog, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with caplog.at_level("WARNING"), TrajectoryWriter.resume(run) as writer:
        writer.append(small(30))
    assert f"{run} has no locks" in caplog.text
    assert Trajectory.open(run).steps == (0, 10, 20, 30)


def test_a_lock_that_fails_otherwise_is_an_error(run, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        TrajectoryWriter.resume(run)


def test_the_lock_of_a_dead_process_is_taken_over(run):
    (run / ".writer.lock").write_text("process 1 on a machine that is gone")
    with TrajectoryWriter.resume(run) as writer:
        assert writer.steps == (0, 10, 20)
