"""A recipe takes what makes an optimizer or a scheduler, and not one that exists."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics.recipe import RecipeError

NET = nn.Linear(2, 1)


def test_an_optimizer_in_place_of_a_factory_is_refused_with_what_is_expected() -> None:
    made = torch.optim.SGD(NET.parameters(), lr=0.1)
    with pytest.raises(
        RecipeError, match=r"an existing SGD.*optimizer=partial\(torch\.optim\.AdamW, lr=1e-3\)"
    ):
        dy.Recipe(NET, optimizer=made)


def test_a_scheduler_in_place_of_a_factory_is_refused_with_what_is_expected() -> None:
    made = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(NET.parameters(), lr=0.1), 3)
    with pytest.raises(RecipeError, match=r"an existing StepLR.*scheduler=partial\("):
        dy.Recipe(NET, optimizer=torch.optim.SGD, scheduler=made)


@pytest.mark.parametrize(
    "factory",
    [torch.optim.SGD, partial(torch.optim.AdamW, lr=1e-3), lambda p: torch.optim.SGD(p, lr=0.1), None],
)
def test_whatever_makes_an_optimizer_is_taken(factory) -> None:
    assert dy.Recipe(NET, optimizer=factory).optimizer is factory
