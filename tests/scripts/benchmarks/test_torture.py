"""Every row of the torture table, a few times, and what counts as a broken promise."""

import json
import sys
from dataclasses import replace

import pytest

from scripts.benchmarks import torture
from scripts.benchmarks.torture_rows import verbs
from tests.scripts.calling import call, in_small, rows_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

FEW = {
    "kills": 2,
    "lightning": 1,
    "study": 1,
    "imports": 1,
    "fits": 1,
    "sweeps": 1,
    "clusters": 1,
    "damage": 2,
    "malice": 1,
    "hostile": 99,
    "quota": 1,
    "disk": 1,
    "denied": 1,
    "vanishing": 1,
    "beside": 10,
    "locks": 1,
    "interruptions": 1,
    "calls": 3,
    "walks": 4,
    "appends": 40,
    "fuzzing": 1,
    "packages": 1,
}


def of(trials, **counts):
    """A table of one row."""
    return {"calls": torture.Row(trials, **{"short": 1, "long": 1, "at_once": 1, **counts})}


def test_every_row_is_tried():
    assert set(FEW) == set(torture.ROWS)


def test_every_verb_that_runs_a_model_is_interrupted():
    from dynamics import attribution, patching

    rooms = {name: verb for room in (patching, attribution) for name, verb in vars(room).items()}
    running = {name for name, verb in rooms.items() if hasattr(verb, "__wrapped__")}
    of_verbs = {"both_directions", "interactions", "shapley_values"}
    assert running - of_verbs == set(verbs.VERBS)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in FEW if row != "packages"])
def test_no_promise_is_broken_in_a_few_trials(row):
    few = replace(torture.ROWS[row], short=FEW[row])
    with in_small(torture, ROWS={row: few}):
        said = call(torture, "--rows", row)
    promise, trials, outcomes, broken = rows_of(said)[2]
    assert promise == few.promise
    assert int(trials) > 0
    assert outcomes
    assert broken == "0"


def test_a_script_that_breaks_a_promise_says_which_and_fails(capsys):
    def silent(n, folder, rng):
        """Nothing is silent"""
        yield "BROKEN: silent"

    with in_small(torture, ROWS=of(silent)), pytest.raises(SystemExit) as left:
        torture.main(["--rows", "calls"])
    assert left.value.code == 1
    assert "BROKEN: silent" in capsys.readouterr().err


def test_a_row_that_was_interrupted_goes_on_where_it_stopped_with_the_same_moments(tmp_path):
    drawn = []

    def trials(n, folder, rng):
        """Goes on"""
        for _ in range(n):
            drawn.append(int(rng.integers(1000)))
            yield str(drawn[-1] % 2)
            if len(drawn) == 5:
                raise KeyboardInterrupt

    rows = of(trials, short=7, at_once=2)
    with in_small(torture, ROWS=rows):
        with pytest.raises(KeyboardInterrupt):
            call(torture, "--rows", "calls", "--keep", tmp_path)
        (kept,) = tmp_path.iterdir()
        assert [sum(part.values()) for part in json.loads(kept.read_text())] == [2, 2]
        first = drawn[:5]
        assert rows_of(call(torture, "--rows", "calls", "--keep", tmp_path))[2][1] == "7"
        assert len(drawn) == 5 + 3
        assert drawn[5] == first[4]
        call(torture, "--rows", "calls", "--keep", tmp_path)
        assert len(drawn) == 8
