"""Fused attention, for which vmap has no rule, is taken apart under it: users' networks are measured at once."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynamics as dy
from tests.zoo.small_models import classifier_recipe, points


class Attending(nn.Module):
    """Points as sequences of numbers, with `scaled_dot_product_attention` as users call it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(1, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x[..., None]).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(-2)).mean(1)


def margin(model, batch):
    x, y = batch
    return model(x).gather(1, y[:, None])[:, 0]


def one_by_one(model, batch):
    return margin(model, batch) + 0 * float(margin(model, batch).detach().sum())


@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates, dy.attribute_step])
def test_a_network_with_fused_attention_is_measured_at_once_as_it_is_one_by_one(verb):
    torch.manual_seed(0)
    recipe = classifier_recipe(model=Attending().double())
    pairs = [dy.Contrast(points(i), points(i + 3), points(i + 6), {"example": f"{i}"}) for i in range(2)]
    chosen = dy.sites.parameters(recipe.model)
    found, slow = (verb(recipe, None, pairs, chosen, measure) for measure in (margin, one_by_one))
    said, said_slow = (json.loads(each.attrs["provenance"])["paths"] for each in (found, slow))
    part = "gradients of the measure" if verb is dy.attribute_step else "measures"
    assert said["gradients"].startswith("vmap(grad)")
    assert said[part].startswith("vmap over ")
    assert said_slow[part].startswith("one model at a time, since ")
    for variable in found.data_vars:
        np.testing.assert_allclose(found[variable], slow[variable], rtol=0, atol=1e-12)


def test_attention_is_the_users_own_again_afterwards():
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    recipe = classifier_recipe(model=Attending().double())
    pair = dy.Contrast(points(1), points(2), points(3))
    dy.patch_updates(recipe, None, [pair], dy.sites.parameters(recipe.model), margin)
    assert before == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )
