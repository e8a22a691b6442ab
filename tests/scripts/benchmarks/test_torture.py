"""Every row of the torture table, a few times, and what counts as a broken promise."""

import os
import sys
import time

import pytest

from scripts.benchmarks import torture
from tests.scripts.calling import call, in_small, rows_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

FEW = {
    "kills": 2,
    "imports": 1,
    "sweeps": 1,
    "fits": 1,
    "damage": 2,
    "malice": 1,
    "hostile": 99,
    "full": 1,
    "beside": 10,
    "interruptions": 1,
    "leaks": 3,
}


def test_every_row_is_tried():
    assert set(FEW) == set(torture.ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("row", FEW)
def test_no_promise_is_broken_in_a_few_trials(row):
    work, _, _ = torture.ROWS[row]
    with in_small(torture, ROWS={row: (work, FEW[row], 0)}):
        said = call(torture, "--rows", row)
    promise, trials, outcomes, broken = rows_of(said)[2]
    assert promise == work.__doc__
    assert int(trials) > 0
    assert outcomes
    assert broken == "0"


def test_crashes_hangs_and_errors_of_a_trial_are_broken_promises():
    assert torture.forked(lambda: "well") == "well"
    assert torture.forked(lambda: str(os.kill(os.getpid(), 11))) == "BROKEN: crashed with SIGSEGV"
    assert torture.forked(lambda: str(time.sleep(60)), limit=0.1).startswith("BROKEN: hung")
    assert torture.forked(lambda: str(1 / 0)) == "BROKEN: ZeroDivisionError: division by zero"
    assert torture.forked(lambda: str(time.sleep(60)), kill_after=0.1) == "killed"


def test_a_script_that_breaks_a_promise_says_which_and_fails(capsys):
    def silent(n, folder, rng):
        """Nothing is silent"""
        yield "BROKEN: silent"

    with in_small(torture, ROWS={"leaks": (silent, 1, 1)}), pytest.raises(SystemExit) as left:
        torture.main(["--rows", "leaks"])
    assert left.value.code == 1
    assert "BROKEN: silent" in capsys.readouterr().err
