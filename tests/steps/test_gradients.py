"""The gradient of one step: from copies of the checkpoint's parameters, or from the parameters themselves."""

import pytest
import torch
from torch import nn

from dynamics.recipe import Recipe, RecipeError
from dynamics.steps.gradients import gradient, gradient_at
from dynamics.steps.states import starting_point
from tests.zoo.small_models import tokens, transformer_recipe


def test_from_the_parameters_themselves_it_is_the_same_to_the_bit_and_they_stay():
    recipe, batch = transformer_recipe(), tokens(3)
    state = starting_point(recipe, None)
    kept = {n: p.clone() for n, p in state.parameters.items()}
    copied, own = gradient(recipe, state, batch), gradient_at(recipe, state, batch)
    assert all(torch.equal(g, own.gradients[n]) for n, g in copied.gradients.items())
    assert all(torch.equal(p, kept[n]) for n, p in state.parameters.items())
    assert not any(p.requires_grad for p in state.parameters.values())


def test_a_forward_pass_that_writes_into_parameters_is_refused_and_only_copies_are_lost():
    model = nn.Embedding(5, 4, max_norm=0.1)
    recipe = Recipe(model, lambda m, batch: m(batch).sum(), torch.optim.SGD)
    state = starting_point(recipe, None)
    kept = state.parameters["weight"].clone()
    with pytest.raises(RecipeError, match="writes into weight"):
        gradient(recipe, state, torch.arange(5))
    assert torch.equal(state.parameters["weight"], kept)
    with pytest.raises(RecipeError, match="writes into weight"):
        gradient_at(recipe, state, torch.arange(5))
    assert not torch.equal(state.parameters["weight"], kept)
