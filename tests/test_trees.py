"""Exchanging slices is a selection: every element keeps its bits, and nothing is shared or changed."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamics.trees import exchanged, squared_norm
from tests.zoo.small_models import draws, examples

SHAPE = (4, 3, 2)


def axis_indices(size):
    bounds = st.integers(-size, size)
    return (
        st.integers(-size, size - 1)
        | st.builds(slice, bounds, bounds, st.integers(1, 3))
        | st.just(slice(None))
    )


tuples = st.integers(0, 3).flatmap(lambda n: st.tuples(*(axis_indices(size) for size in SHAPE[:n])))
masks = st.lists(st.booleans(), min_size=24, max_size=24).map(lambda bits: torch.tensor(bits).reshape(SHAPE))
indices = st.just(...) | tuples | masks


def tensors(seed):
    generator = draws(seed)
    return {name: torch.randn(SHAPE, generator=generator, dtype=torch.float64) for name in ("a", "b", "c")}


BASE, SOURCE = tensors(0), tensors(1)


def inside(index):
    covered = torch.zeros(SHAPE, dtype=torch.bool)
    covered[index] = True
    return covered


@examples
@given(a=indices, b=indices)
def test_every_element_is_the_sources_where_covered_and_the_bases_elsewhere(a, b):
    found = exchanged(BASE, SOURCE, {"a": a, "b": b})
    assert list(found) == list(BASE)
    for name, index in (("a", a), ("b", b)):
        assert torch.equal(found[name], torch.where(inside(index), SOURCE[name], BASE[name]))
    assert found["c"] is BASE["c"]


@examples
@given(index=indices)
def test_nothing_that_was_given_is_changed(index):
    base, source = tensors(0), tensors(1)
    exchanged(base, source, {"a": index})
    assert all(torch.equal(base[n], BASE[n]) and torch.equal(source[n], SOURCE[n]) for n in base)


@examples
@given(index=indices)
def test_an_exchange_and_the_exchange_of_what_it_left_complete_each_other(index):
    there = exchanged(BASE, SOURCE, {"a": index})["a"]
    back = exchanged(SOURCE, BASE, {"a": index})["a"]
    assert torch.equal(there + back, BASE["a"] + SOURCE["a"])
    assert torch.equal(exchanged({"a": there}, BASE, {"a": index})["a"], BASE["a"])


@examples
@given(index=indices)
def test_exchanging_twice_is_exchanging_once(index):
    once = exchanged(BASE, SOURCE, {"a": index})
    assert torch.equal(exchanged(once, SOURCE, {"a": index})["a"], once["a"])


@examples
@given(index=indices)
def test_exchanging_with_itself_changes_no_bit(index):
    same = {"a": torch.tensor([0.0, -0.0, torch.nan, torch.inf]).repeat(6).reshape(SHAPE)}
    bits = exchanged(same, same, {"a": index})["a"].view(torch.int32)
    assert torch.equal(bits, same["a"].view(torch.int32))


@examples
@given(index=tuples | masks)
def test_what_is_missing_on_one_side_counts_as_zero_when_a_part_is_exchanged(index):
    nothing, zero = {"a": None}, {"a": torch.zeros(SHAPE, dtype=torch.float64)}
    for base, source in ((BASE, nothing), (nothing, SOURCE)):
        found = exchanged({"a": base["a"]}, source, {"a": index})["a"]
        filled = [zero if side is nothing else side for side in (base, source)]
        assert torch.equal(found, exchanged({"a": filled[0]["a"]}, filled[1], {"a": index})["a"])


@examples
@given(index=indices)
def test_what_is_missing_on_both_sides_stays_missing(index):
    assert exchanged({"a": None}, {"a": None}, {"a": index}) == {"a": None}


def test_a_whole_tensor_goes_missing_with_the_source_and_appears_with_it():
    assert exchanged(BASE, {**SOURCE, "a": None}, {"a": ...})["a"] is None
    assert exchanged({**BASE, "a": None}, SOURCE, {"a": ...})["a"] is SOURCE["a"]


@examples
@given(mask=masks)
def test_squared_norms_of_a_mask_and_of_the_rest_add_up(mask):
    whole = squared_norm(BASE["a"])
    assert abs(squared_norm(BASE["a"][mask]) + squared_norm(BASE["a"][~mask]) - whole) < 1e-12 * whole


def test_nothing_has_the_norm_zero():
    assert squared_norm(None) == 0.0
    assert squared_norm(torch.zeros(3)) == 0.0
