"""The account beside ExPLAIND, in small; ExPLAIND's side where EXPLAIND_PYTHON names an interpreter that has it."""

import os

import numpy as np
import pytest
import torch

from scripts.benchmarks import beside_explaind as beside
from tests.scripts.calling import call, in_small, rows_of

PYTHON = os.environ.get("EXPLAIND_PYTHON")


@pytest.fixture(autouse=True)
def _small():
    def here(function, *arguments):
        return function(*arguments)

    sizes = {"MODULUS": 7, "D_MODEL": 16, "D_MLP": 16, "ROWS": 12, "BATCH": 6, "STEPS": 3, "HELDOUT": 2}
    with in_small(beside, **sizes, in_its_own_process=here):
        yield


@pytest.mark.slow
def test_every_way_of_asking_is_told_beside_the_same_change():
    said = call(beside)
    table = [row for row in rows_of(said) if len(row) == 7]
    assert [row[0] for row in table[2:]] == [f"account: {way}" for way in beside.WAYS]
    assert float(table[-1][2].removesuffix(" %")) < 0.1
    assert all(row[-1] == "0" for row in table[2:])
    assert "ExPLAIND 0.1" in said.splitlines()[-len(beside.CAN_BE_ASKED) - 2]


@pytest.mark.slow
def test_rows_of_the_training_data_write_the_change_less_the_decay():
    found = beside.here("trapezoid alone, each row a source")
    undecayed = dict(beside.ADAMW, weight_decay=0.0)
    with in_small(beside, ADAMW=undecayed):
        without = beside.here("trapezoid alone, each row a source")
    assert not np.isclose(found["by_row"].sum() / beside.HELDOUT, found["sum"], rtol=1e-3)
    assert np.isclose(without["by_row"].sum() / beside.HELDOUT, without["sum"], rtol=1e-5)


def test_every_step_is_of_other_rows_until_all_were_seen():
    _, tokens, targets, order, (heldout, _) = beside.drawn()
    assert sorted(order[:2].flatten().tolist()) == list(range(12))
    assert torch.equal((tokens[:, 0] + tokens[:, 2]) % 7, targets)
    assert not {tuple(row) for row in tokens.tolist()} & {tuple(row) for row in heldout.tolist()}


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="EXPLAIND_PYTHON names no interpreter with ExPLAIND 0.1")
def test_explaind_sees_the_same_training_and_gives_rows_the_same_scores():
    ours, its = beside.here("tolerance 1e-4, each row a source"), beside.there(PYTHON, 100)
    assert beside.agreement(ours, its).startswith("Weights after the last step are the same ")
    assert ours["change"] == pytest.approx(its["change"], rel=1e-4)
    assert its["sum"] == pytest.approx(its["change"], rel=1e-3)
    assert np.corrcoef(ours["by_row"].ravel(), its["by_row"].ravel())[0, 1] > 0.999
