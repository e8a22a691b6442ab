"""When heads become causal, in miniature."""

import pytest

from scripts.experiments import when_causal
from tests.scripts.calling import call, rows_of


@pytest.mark.slow
def test_when_causal_has_a_line_for_each_layer_and_each_circuit(facts_runs, tmp_path):
    text = call(when_causal, *facts_runs, "--out", tmp_path)
    rows = [row for row in rows_of(text) if row[0] == "facts"]
    assert [row[1] for row in rows[:2]] == ["0", "1"]
    steps = [int(row[1]) for row in rows[2:]]
    assert steps == sorted(steps)
    assert len(steps) == 5
    assert all(step < 60 for step in steps)
    assert (tmp_path / "causal.png").exists()
