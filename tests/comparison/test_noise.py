"""The noise floor of an answer."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.config import ConfigError


@pytest.fixture
def checkpoint():
    torch.manual_seed(0)
    return Checkpoint.capture(nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3)).double())


def _sum(state):
    total = sum(float(p.sum()) for p in state.parameters.values())
    return xr.Dataset({"effect": ("site", [total])}, {"site": ["all"]}, {"provenance": "{}"})


def test_parameters_move_by_the_relative_size_asked_for_and_nothing_else_moves(checkpoint):
    before = {name: p.clone() for name, p in checkpoint.parameters.items()}
    noisy = dy.comparison.perturbed(checkpoint, seed=3, scale=1e-3)
    for name, p in before.items():
        assert torch.equal(checkpoint.parameters[name], p)
        relative = (noisy.parameters[name] / p - 1) / 1e-3
        assert abs(float(relative.std()) - 1) < 4 / len(p.flatten()) ** 0.5
    assert noisy.step == checkpoint.step
    assert noisy.parameters["0.weight"].dtype == torch.float64


def test_the_same_seed_is_the_same_noise_and_another_seed_another(checkpoint):
    one, same, other = (dy.comparison.perturbed(checkpoint, seed).parameters for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_answers_of_every_draw_are_kept_beside_each_other(checkpoint):
    floor = dy.comparison.under_noise(_sum, checkpoint, draws=3, scale=1e-2)
    expected = [float(_sum(dy.comparison.perturbed(checkpoint, n, 1e-2))["effect"][0]) for n in range(3)]
    np.testing.assert_array_equal(floor["effect"].transpose("noise", "site").values[:, 0], expected)
    assert floor["noise"].values.tolist() == [0, 1, 2]


def test_the_spread_of_a_sum_is_that_of_its_terms_noise(checkpoint):
    """var Σ θ(1 + s ξ) = s² Σ θ²: noise has nothing to do with weights, even those drawn from the same seed."""
    floor = dy.comparison.under_noise(_sum, checkpoint, draws=200, scale=1e-2)
    squares = sum(float(p.square().sum()) for p in checkpoint.parameters.values())
    assert float(floor["effect"].std("noise", ddof=1)[0]) == pytest.approx(1e-2 * squares**0.5, rel=0.2)


def test_no_generator_is_moved(checkpoint):
    state = torch.get_rng_state()
    dy.comparison.under_noise(_sum, checkpoint, draws=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("settings", "said"), [({"draws": 1}, "draws=1"), ({"scale": 0.0}, "scale=0.0")])
def test_a_floor_of_nothing_is_refused(checkpoint, settings, said):
    with pytest.raises(ConfigError, match=said):
        dy.comparison.under_noise(_sum, checkpoint, **settings)
