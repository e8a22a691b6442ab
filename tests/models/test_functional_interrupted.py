"""A model's modes come back where an interruption falls into the middle of changing them."""

import pytest
from torch import nn

from dynamics.models.functional import eval_mode


class Interrupted(nn.Linear):
    def train(self, mode: bool = True) -> nn.Module:
        raise KeyboardInterrupt


def test_modes_come_back_where_ctrl_c_falls_between_two_submodules():
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1), Interrupted(1, 1))
    with pytest.raises(KeyboardInterrupt), eval_mode(model):
        pass
    assert all(module.training for module in model.modules())
