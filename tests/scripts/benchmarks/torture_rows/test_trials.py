"""What a trial comes to: crashes, hangs and errors of its process are broken promises."""

import os
import sys
import time

import pytest

from scripts.benchmarks.torture_rows import trials

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def test_crashes_hangs_and_errors_of_a_trial_are_broken_promises():
    assert trials.forked(lambda: "well") == "well"
    assert trials.forked(lambda: str(os.kill(os.getpid(), 11))) == "BROKEN: crashed with SIGSEGV"
    assert trials.forked(lambda: str(time.sleep(60)), limit=0.1).startswith("BROKEN: hung")
    assert trials.forked(lambda: str(1 / 0)) == "BROKEN: ZeroDivisionError: division by zero"
    assert trials.forked(lambda: str(time.sleep(60)), kill_after=0.1) == "killed"
