"""Runs of one's own: their files are checked, and with the recipe their steps are replayed."""

from functools import partial

import pytest
import torch
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory
from dynamics.cli import main
from tests.zoo.cli_runs import BATCHES, squared_error


@pytest.fixture
def recipe(own_model):
    return dy.Recipe(own_model, squared_error, partial(torch.optim.AdamW, lr=0.1))


def test_of_a_run_of_ones_own_the_files_are_checked_and_the_recipe_is_asked_for(own_run, capsys):
    main(["verify", str(own_run)])
    said = capsys.readouterr().out
    assert said.startswith("4 files match their checksums.\n")
    assert "a replay needs the recipe" in said
    assert "dynamics.steps.verify(recipe, run, batch_of)" in said


def test_a_damaged_file_of_a_run_of_ones_own_is_named(own_run, capsys):
    victim = own_run / "trajectory" / "step-00000003.h5"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(SystemExit) as left:
        main(["verify", str(own_run)])
    assert left.value.code == 1
    assert victim.name in capsys.readouterr().out


def test_with_the_recipe_every_stored_neighbour_replays_bit_for_bit(own_run, recipe):
    verdicts = list(dy.steps.verify(recipe, Trajectory.open(own_run), BATCHES.__getitem__))
    assert [(v.start, v.stop, v.differences) for v in verdicts] == [(0, 2, ()), (2, 3, ()), (3, 5, ())]


def test_other_batches_are_seen_where_they_were_taken(own_run, recipe):
    given = [*BATCHES[:2], BATCHES[2] + 1, *BATCHES[3:]]
    verdicts = list(dy.steps.verify(recipe, Trajectory.open(own_run), given.__getitem__))
    assert [bool(v.differences) for v in verdicts] == [False, True, False]
    assert any("0.weight" in name for name in verdicts[1].differences)


def test_an_environment_that_is_the_same_has_no_changes(own_run):
    checkpoint = Trajectory.open(own_run).last
    assert dy.steps.environment_changes(checkpoint) == []
    checkpoint.fingerprint["threads"] = "99"
    (change,) = dy.steps.environment_changes(checkpoint)
    assert change.startswith("threads was 99, here ")


@pytest.mark.parametrize(
    "words", [["compare", "RUN", "--from", "0", "--to", "3"], ["believe", "RUN", "--site", "0.weight"]]
)
def test_what_needs_a_task_says_so_in_one_line(own_run, capsys, words):
    with pytest.raises(SystemExit) as left:
        main([word.replace("RUN", str(own_run)) for word in words])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ConfigError: ")
    assert "task" in line


def test_a_damaged_file_of_results_in_a_run_is_named_and_the_command_fails(own_run, capsys):
    path = own_run / "results" / "one.h5"
    dy.results.save(xr.Dataset({"effect": ("example", [1.0, 2.0])}), path)
    (own_run / "notes.txt").write_text("mine")
    main(["verify", str(own_run)])
    said = capsys.readouterr().out
    assert said.startswith(
        "5 files match their checksums.\nnote: 1 carry none and are unchecked: notes.txt\n"
    )
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit) as left:
        main(["verify", str(own_run)])
    assert left.value.code == 1
    assert "one.h5 is damaged" in capsys.readouterr().out


def test_the_cause_of_a_mismatch_is_printed_below_it(own_run, capsys, monkeypatch):
    found = dy.steps.verifying.Verdict(0, 2, ("parameters/0.weight",), "the learning rate was 0.2")
    monkeypatch.setattr("dynamics.cli.verify.task_name", lambda config: "aliases")
    monkeypatch.setattr("dynamics.studies.verify", lambda run: iter([found]))
    with pytest.raises(SystemExit):
        main(["verify", str(own_run)])
    said = capsys.readouterr().out.splitlines()
    assert "step 0 replayed to 2 differs in 1: parameters/0.weight" in said
    assert "  explained: the learning rate was 0.2" in said
