"""Two checkpoints of a pair are of one architecture, or it is said what differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from checkpoints import Checkpoint, CheckpointPair


def test_a_reversed_pair_has_base_and_source_exchanged(small: Callable[..., Checkpoint]) -> None:
    pair = CheckpointPair(small(3), small(7, value=1.0))
    turned = pair.reversed()
    assert (turned.base, turned.source) == (pair.source, pair.base)


def test_a_pair_moves_with_all_its_tensors(small: Callable[..., Checkpoint]) -> None:
    moved = CheckpointPair(small(3), small(7)).to("meta")
    assert {c.parameters["w"].device.type for c in (moved.base, moved.source)} == {"meta"}
    assert (moved.base.step, moved.source.step) == (3, 7)


def test_a_pair_says_what_it_holds_in_a_line(small: Callable[..., Checkpoint]) -> None:
    assert repr(CheckpointPair(small(3), small(7))) == (
        "CheckpointPair(base=Checkpoint(step=3, 1 parameters, 0 buffers, no optimizer), "
        "source=Checkpoint(step=7, 1 parameters, 0 buffers, no optimizer))"
    )


W = torch.zeros(3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"w": W, "v": W}, r"parameters of .* differ: the source has \['v'\], the base does not\. Pair"),
        ({}, r"the base has \['w'\], the source does not"),
        ({"v": W}, r"the source has \['v'\], the base does not; the base has \['w'\], the source does not"),
        (
            {"w": torch.zeros(4)},
            r"w is \(3,\) torch\.float32 in the base, \(4,\) torch\.float32 in the source",
        ),
        ({"w": W.double()}, r"w is \(3,\) torch\.float32 in the base, \(3,\) torch\.float64 in the source"),
    ],
)
def test_parameters_that_differ_in_name_shape_or_dtype_are_named(
    small: Callable[..., Checkpoint], parameters: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointPair(small(0), replace(small(1), parameters=parameters))


def test_buffers_that_differ_are_named_as_buffers() -> None:
    one, other = Checkpoint.capture(nn.BatchNorm1d(2)), Checkpoint.capture(nn.BatchNorm1d(2))
    fewer = replace(other, buffers={n: b for n, b in other.buffers.items() if n != "running_var"})
    with pytest.raises(
        ValueError, match=r"The buffers of .*: the base has \['running_var'\], the source does not"
    ):
        CheckpointPair(one, fewer)
