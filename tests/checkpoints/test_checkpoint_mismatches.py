"""What does not fit a checkpoint is said in numbers and by its first difference, whatever the model's size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from checkpoints import Checkpoint

N = 100


def net(width: int = 2) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(N)))


def optimizer(model: nn.Module, *groups: slice) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.SGD([{"params": parameters[group]} for group in groups], lr=0.1)


CASES = {
    "a parameter that the recorded group has not": (
        [slice(0, 2 * N - 1)],
        [slice(0, 2 * N)],
        r"has 1 group of 200 parameters, the checkpoint 1 group of 199 parameters\. .*"
        r"group 0 holds '99\.bias', which the checkpoint's group 0 does not",
    ),
    "a parameter fewer": (
        [slice(0, 2 * N)],
        [slice(1, 2 * N)],
        r"has 1 group of 199 .* 1 group of 200 .*"
        r"group 0 holds 199 parameters; the checkpoint's group 0 holds '0\.weight' besides",
    ),
    "a parameter in another group": (
        [slice(0, 150), slice(150, 200)],
        [slice(0, 151), slice(151, 200)],
        r"2 groups of 200 .* 2 groups of 200 .*group 0 holds '75\.weight', which the checkpoint's group 0 does not",
    ),
    "one group of two": (
        [slice(0, 150), slice(150, 200)],
        [slice(0, 200)],
        r"1 group of 200 parameters, the checkpoint 2 groups of 200 .*'75\.weight', which the checkpoint's group 0",
    ),
    "a later group": (
        [slice(0, 150), slice(150, 200)],
        [slice(0, 150), slice(150, 199)],
        r"group 1 holds 49 parameters; the checkpoint's group 1 holds '99\.bias' besides",
    ),
    "a group that nothing takes": (
        [slice(0, 150), slice(150, 200)],
        [slice(0, 150)],
        r"2 parameter groups, the optimizer 1; nothing takes its group 1 of 50 parameters, the first '75\.weight'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_that_differ_are_counted_and_the_first_difference_is_named(name: str) -> None:
    recorded, present, message = CASES[name]
    model = net()
    checkpoint = Checkpoint.capture(model, optimizer(model, *recorded))
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.restore(model, optimizer(model, *present))
    assert len(str(error.value)) < 300
    assert "Build the optimizer with the groups it was trained with." in str(error.value)


def test_another_models_tensors_are_counted_and_the_first_ones_are_named() -> None:
    checkpoint = Checkpoint.capture(net())
    with pytest.raises(ValueError, match=r"0\.weight is \(2, 2\) .*\(3, 3\) .*, and 199 more") as error:
        checkpoint.restore(net(3))
    assert len(str(error.value)) < 400
    named = nn.ModuleDict({f"layer {i}": nn.Linear(2, 2) for i in range(N)})
    with pytest.raises(
        ValueError, match=r"\['layer 0\.weight'.* and 195 more.*\['0\.weight'.* and 195 more"
    ) as error:
        checkpoint.restore(named)
    assert len(str(error.value)) < 500
