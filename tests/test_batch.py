"""Batch: rows chosen, moved, joined and carried through torch's pytrees."""

import copy
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch.func import vmap
from torch.utils import _pytree

from dynamics.batch import Batch, concatenate
from dynamics.recipe import Contrast


def batch(n_rows: int = 4, first: int = 0, optional: bool = True) -> Batch:
    """Rows whose every entry tells which row and column it came from."""
    row = torch.arange(first, first + n_rows)
    extra = {
        "distractors": torch.stack([300 + row, 400 + row], 1),
        "example_ids": 500 + row,
        "attention_mask": torch.stack([600 + row, 700 + row, 800 + row], 1),
    }
    extra = extra if optional else {}
    return Batch(tokens=10 * row[:, None] + torch.arange(3), target_pos=100 + row, targets=200 + row, **extra)


def as_lists(one: Batch) -> dict[str, list | None]:
    return {f.name: None if (v := getattr(one, f.name)) is None else v.tolist() for f in fields(one)}


ROWS_2_AND_0 = {
    "tokens": [[20, 21, 22], [0, 1, 2]],
    "target_pos": [102, 100],
    "targets": [202, 200],
    "distractors": [[302, 402], [300, 400]],
    "example_ids": [502, 500],
    "attention_mask": [[602, 702, 802], [600, 700, 800]],
}


def test_rows_chosen_by_an_index_tensor_come_in_its_order_in_every_field():
    assert as_lists(batch()[torch.tensor([2, 0])]) == ROWS_2_AND_0


def test_slices_lists_and_masks_choose_rows_as_they_do_of_a_tensor():
    assert as_lists(batch()[1:3]) == as_lists(batch(2, first=1))
    assert as_lists(batch()[[2, 0]]) == ROWS_2_AND_0
    assert as_lists(batch()[torch.tensor([False, True, True, False])]) == as_lists(batch(2, first=1))
    assert len(batch()[:0]) == 0


def test_fields_that_are_absent_stay_absent():
    bare = batch(optional=False)
    for changed in (bare[1:], bare.to("cpu"), concatenate([bare, bare])):
        assert changed.distractors is None
        assert changed.example_ids is None


def test_the_length_is_the_number_of_rows():
    assert [len(batch(n)) for n in (1, 4)] == [1, 4]


def test_a_batch_moves_with_all_its_fields_and_the_original_stays():
    original = batch()
    moved = original.to("meta")
    assert {getattr(moved, f.name).device.type for f in fields(moved)} == {"meta"}
    assert {getattr(original, f.name).device.type for f in fields(original)} == {"cpu"}
    assert as_lists(original.to(torch.device("cpu"))) == as_lists(original)


def test_a_contrast_moves_with_all_its_batches_whatever_they_are():
    original = Contrast(
        batch(), (torch.ones(2), {"x": torch.ones(3), "name": "a"}), batch(), {"example": "one"}
    )
    moved = original.to("meta")
    found = [moved.base.tokens, moved.base.targets, moved.source[0], moved.source[1]["x"], moved.probe.tokens]
    assert {t.device.type for t in found} == {"meta"}
    assert (moved.source[1]["name"], moved.coords) == ("a", {"example": "one"})
    assert Contrast(batch(), batch()).to("meta").probe is None
    assert original.source[0].device.type == original.base.tokens.device.type == "cpu"


def test_a_batch_cannot_be_changed_in_place_and_compares_by_identity():
    one = batch()
    with pytest.raises(FrozenInstanceError):
        one.tokens = one.targets  # type: ignore[misc]
    assert one != copy.deepcopy(one)
    assert {one: 3}[one] == 3


@pytest.mark.parametrize("optional", [True, False])
def test_batches_joined_are_the_rows_of_all_in_order(optional):
    joined = concatenate([batch(1, 0, optional), batch(2, 1, optional), batch(1, 3, optional)])
    assert as_lists(joined) == as_lists(batch(4, 0, optional))


def test_joining_cut_rows_gives_the_whole_back():
    whole = batch(5)
    assert as_lists(concatenate([whole[:2], whole[2:]])) == as_lists(whole)


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_field_that_only_some_batches_have_is_named(order):
    with pytest.raises(
        ValueError, match=r"only some of the batches have distractors; give it to all or to none"
    ):
        concatenate([batch(2, 0, optional) for optional in order])


@pytest.mark.parametrize("optional", [True, False])
def test_flattening_as_a_pytree_and_unflattening_gives_the_batch_back(optional):
    leaves, shape = _pytree.tree_flatten({"base": batch(2, 0, optional), "n": 3})
    again = _pytree.tree_unflatten(leaves, shape)
    assert isinstance(again["base"], Batch)
    assert as_lists(again["base"]) == as_lists(batch(2, 0, optional))
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == (6 if optional else 3)


def test_a_pytree_map_reaches_every_tensor():
    doubled = _pytree.tree_map_only(torch.Tensor, lambda t: 2 * t, batch(2))
    assert as_lists(doubled)["targets"] == [400, 402]
    assert as_lists(doubled)["distractors"] == [[600, 800], [602, 802]]


def row_sum(row: Batch) -> torch.Tensor:
    return row.tokens.sum() + row.targets


def test_vmap_goes_over_the_rows_of_a_batch():
    assert vmap(row_sum)(batch(2)).tolist() == [0 + 1 + 2 + 200, 10 + 11 + 12 + 201]


def test_vmap_goes_over_the_rows_of_a_batch_without_optional_fields():
    assert vmap(row_sum)(batch(2, optional=False)).tolist() == [203, 234]
