"""The cost of comparing, of a few checkpoints."""

import pytest

from scripts.benchmarks import comparison_cost
from tests.scripts.calling import call, rows_of


@pytest.mark.slow
def test_the_cost_of_comparing_is_told_with_its_goals():
    said = call(comparison_cost, "--checkpoints", "4", "--threads", "1")
    table = rows_of(said)
    assert table[0][0] == "4 checkpoints of the toy"
    assert [row[2] for row in table[2:]] == ["under 0.2 s", "under 60 s", "under 1 GB"]
    assert table[3][0] == "3 neighbours compared"
