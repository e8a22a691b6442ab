"""`dynamics transfer`: parameters of one step put into another, kept, and drawn."""

from __future__ import annotations

import numpy as np
import pytest

import dynamics as dy
from checkpoints import CheckpointPair, Trajectory
from dynamics import results, tasks
from tests.cli.calling import dynamics, succeed

SMALL = ["--levels", "components", "--measures", "correct_logit"]


@pytest.mark.slow
def test_it_is_the_verb_of_every_pair_kept_and_drawn(alias_run):
    printed = succeed("transfer", alias_run, "--from", 3, 7, "--into", 0, 1, *SMALL)
    folder = alias_run / "results" / "transfer"
    (path,) = folder.glob("*.h5")
    assert printed.startswith(f"{path}: 2 step, 2 source_step, 1 measure, ")
    assert f"{path.with_suffix('.png')}, at " in printed
    assert path.with_suffix(".png").stat().st_size > 10_000
    found = results.load(path).squeeze("measure")
    run = Trajectory.open(alias_run)
    task = tasks.load(run.config)
    model = task.model()
    pair = CheckpointPair(run.at(1), run.at(7))
    by_hand = dy.patch_parameters(
        dy.Recipe(model), pair, task.contrasts(), dy.sites.components(model), dy.measures.correct_logit
    )
    np.testing.assert_array_equal(found["effect"].sel(step=1, source_step=7), by_hand["effect"])

    kept = {file: file.stat().st_mtime_ns for file in (folder / "shards").iterdir()}
    assert succeed("transfer", alias_run, "--from", 3, 7, "--into", 0, 1, *SMALL) == printed
    assert {file: file.stat().st_mtime_ns for file in (folder / "shards").iterdir()} == kept


@pytest.mark.slow
def test_the_integral_is_asked_for_by_the_name_of_its_verb(alias_run, tmp_path):
    given = ["--from", 7, "--into", 0, "--verb", "attribute_parameters", "--out", tmp_path / "kept", *SMALL]
    succeed("transfer", alias_run, *given)
    (path,) = (tmp_path / "kept").glob("attribute_parameters-*.h5")
    assert "attribution" in results.load(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", 3], "the following arguments are required: --into"),
        (["--from", 3, "--into", 8], "step 8 is not a step of"),
        (["--from", 8, "--into", 3], "step 8 is not a step of"),
    ],
)
def test_what_cannot_be_is_said(alias_run, words, message):
    done = dynamics("transfer", alias_run, *words)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
def test_another_run_may_give(alias_run, tmp_path):
    words = ("--from", 7, "--into", 1, *SMALL, "--out")
    succeed("transfer", alias_run, *words, tmp_path / "own")
    succeed("transfer", alias_run, "--source", alias_run, *words, tmp_path / "other")
    own, other = (results.load(next((tmp_path / name).glob("*.h5"))) for name in ("own", "other"))
    assert own.drop_attrs().identical(other.drop_attrs())
    assert "source_run" in other.attrs["provenance"]
