"""Writes above reads on one time axis, in miniature."""

import numpy as np
import pytest

from scripts.experiments import writes_and_reads
from tests.scripts.calling import call, in_small, rows_of


def test_half_is_where_half_of_the_way_is_gone():
    half = writes_and_reads.half
    across = np.arange(12.0)
    assert half(across, np.array([0, 0, 0, 1, 2, 4, 6, 8, 9, 10, 10, 10.0])) == 6
    assert half(across, -np.array([0, 0, 0, 1, 2, 4, 6, 8, 9, 10, 10, 10.0])) == 6


@pytest.mark.slow
def test_writes_and_reads_has_a_line_for_facts_and_one_for_aliases(facts_runs, alias_runs, tmp_path):
    with in_small(writes_and_reads, FACT_STEPS=range(4), ALIAS_STEPS=range(4)):
        text = call(writes_and_reads, *facts_runs, "--aliases", alias_runs[0], "--out", tmp_path / "out")
    fact, alias = rows_of(text)[2:]
    assert fact[:2] == ["fact", "2"]  # runs
    assert alias[0] == "alias"
    assert (tmp_path / "out" / "writes.png").exists()
