"""Which steps are kept."""

import doctest
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import every, log_spaced, schedule, union, window

bounds = st.tuples(st.integers(0, 500), st.integers(0, 5000)).map(lambda pair: (pair[0], sum(pair)))


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(schedule)
    assert result.attempted >= 5
    assert result.failed == 0


@given(bounds, st.integers(1, 40))
def test_log_spacing_is_dense_early_sparse_late_and_keeps_both_ends(pair, per_decade):
    start, stop = pair
    steps = log_spaced(stop, per_decade, start)
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert steps[0] == start
    assert steps[-1] == stop
    assert all(gap >= 1 for gap in gaps)
    assert all(later >= earlier - 1 for earlier, later in pairwise(gaps[:-1]))


@given(bounds, st.integers(1, 400))
def test_every_keeps_the_grid_within_the_bounds(pair, n):
    start, stop = pair
    assert every(n, stop, start) == tuple(s for s in range(start, stop + 1) if (s - start) % n == 0)


@given(st.lists(st.lists(st.integers(0, 99))))
def test_a_union_is_sorted_and_holds_each_step_once(schedules):
    steps = union(*schedules)
    assert list(steps) == sorted(set().union(*map(set, schedules)))


def test_a_phase_is_shifted_by_its_start():
    assert window(100, 103) == (100, 101, 102, 103)
    assert log_spaced(130, 5, start=100) == tuple(100 + step for step in log_spaced(30, 5))


@pytest.mark.parametrize(
    "call",
    [
        lambda: every(0, 10),
        lambda: every(1, 3, start=4),
        lambda: window(-1, 3),
        lambda: log_spaced(10, 0),
    ],
)
def test_impossible_schedules_are_refused(call):
    with pytest.raises(ValueError, match=r"start=|n=|per_decade="):
        call()
