"""`dynamics sweep` as a user meets it."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from dynamics import results
from tests.cli.calling import dynamics, succeed

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--levels", "components", "--measures", "correct_logit", "--optimizers", "fresh"]
PER_STEP = 4 * 10
"""Aliases times components."""


def alive(group: int) -> list[int]:
    """Processes of a group; a container may leave the dead of it unreaped."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.fixture
def run(tiny_runs) -> Path:
    return tiny_runs[0]


def test_a_dry_run_says_what_it_will_take_and_the_sweep_then_does_it_once(run, tmp_path):
    command = ["sweep", run, "--out", tmp_path / "swept", "--steps", 40, 45, 50, *SMALL]
    said = succeed(*command, "--dry-run")
    assert re.fullmatch(r"120 replays: about [\d.]+ s and [\d,]+ MB, by this process\.\n", said)
    assert not (tmp_path / "swept").exists()

    printed = succeed(*command)
    assert "1 optimizer, 3 step, 1 measure, 4 example, 10 site" in printed
    (path,) = (tmp_path / "swept").glob("*.h5")
    assert str(path) in printed
    found = results.load(path)
    assert found["step"].values.tolist() == [40, 45, 50]
    assert np.isfinite(found["effect"].values).all()

    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "swept" / "shards").iterdir()}
    succeed(*command, "--workers", 2)  # nothing is left for them
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "swept" / "shards").iterdir()} == times
    assert "0 replays (120 more are there already)" in succeed(*command, "--dry-run")


def test_by_default_every_stored_step_of_x2_is_swept(run, tmp_path):
    said = succeed("sweep", run, "--out", tmp_path, *SMALL, "--dry-run", "--workers", 1)
    stored = [int(file.stem.removeprefix("step-")) for file in (run / "trajectory").glob("step-*.h5")]
    assert said.startswith(f"{PER_STEP * sum(40 <= step < 60 for step in stored)} replays: about ")
    assert said.endswith("MB each, by 1 workers and this process.\n")


def test_ctrl_c_ends_the_workers_and_the_same_command_goes_on(run, tmp_path):
    steps = ["--steps", *range(40, 60)]  # too many to end between the first shard and the signal
    given = ["sweep", run, "--out", tmp_path / "swept", *steps, *SMALL, "--levels", "matrices"]
    heeding = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from dynamics.cli import main; main()"
    )
    command = [sys.executable, "-c", heeding, *map(str, given), "--workers", "2"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    shards = tmp_path / "swept" / "shards"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(shards.glob("*.h5")):
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "the same command goes on from there" in complaint
    deadline = time.monotonic() + 20
    while alive(process.pid):
        assert time.monotonic() < deadline, alive(process.pid)
        time.sleep(0.1)
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("*.h5")}
    succeed(*given)
    assert kept.items() < {path: path.stat().st_mtime_ns for path in shards.glob("*.h5")}.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 99], "SweepError: step 99 is not a step of"),
        (["--workers", 2, "--scheduler", "tcp://localhost:1"], "SweepError: found workers=2"),
    ],
)
def test_what_cannot_be_swept_is_said_without_a_traceback(run, tmp_path, arguments, message):
    done = dynamics("sweep", run, "--out", tmp_path, *SMALL, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
