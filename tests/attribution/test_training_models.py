"""Accounts of models of every kind: they add up, and leave out only what no gradient can say."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics import measures
from dynamics.recipe import RecipeError
from dynamics.sites import Site
from tests.zoo.any_models import KINDS, made
from tests.zoo.hugging_face import gpt2, hf_loss, llama, neox
from tests.zoo.lightning_modules import BATCHES, Plain
from tests.zoo.small_models import ADAMW, margin, tokens

pytestmark = pytest.mark.slow


def each_tensor(model):
    return [Site(name, {name: ...}) for name, p in model.named_parameters() if p.requires_grad]


def expect_sums(found, at_most):
    """The account is the change but for the residual, which is small beside all that was written."""
    dims = [dim for dim in ("source", "site") if dim in found["attribution"].dims]
    change = found["value"].diff("step")
    written = found["attribution"].isel(step=slice(1, None))
    residual = found["residual"].isel(step=slice(1, None))
    assert (change != 0).any()
    np.testing.assert_allclose(
        written.sum(dims) - change, residual, rtol=0, atol=1e-5 * float(abs(written).sum())
    )
    assert float(abs(residual).sum()) <= at_most * float(abs(written).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_any_module_has_an_account(kind):
    recipe, live = made(kind)
    if kind == "sparse":
        recipe = replace(recipe, clip=None)  # torch clips no sparse gradients
    batches = [KINDS[kind].batch(seed) for seed in range(3)]
    found = dy.attribute_training(
        recipe,
        live.last,
        batches,
        each_tensor(recipe.model),
        {"p": KINDS[kind].batch(9)},
        KINDS[kind].measure,
    )
    buffers = any(True for _ in recipe.model.buffers())
    expect_sums(found, at_most=np.inf if buffers else 0.05)


@pytest.mark.parametrize("build", [gpt2, neox, llama])
def test_a_hugging_face_model_has_an_account_by_source(build):
    recipe = dy.Recipe(build(), hf_loss, ADAMW, max_grad_norm=0.5)
    found = dy.attribute_training(
        recipe,
        None,
        [tokens(seed) for seed in range(3)],
        dy.sites.components(recipe.model),
        {str(seed): tokens(seed) for seed in range(20, 24)},
        measures.correct_logit,
        sources=lambda batch: ["a", "b"] * 3,
    )
    assert found.attrs["partition"] == 1
    expect_sums(found, at_most=0.01)


def test_a_lightning_module_has_an_account_by_source():
    recipe = dy.Recipe.from_lightning(Plain())
    parts = each_tensor(recipe.model)
    asked = {"p": BATCHES[3]}
    found = dy.attribute_training(
        recipe, None, BATCHES[:3], parts, asked, margin, sources=lambda b: b[1].tolist(), tolerance=1e-4
    )
    expect_sums(found, at_most=1e-4)


def test_an_optimizer_over_some_parameters_leaves_the_others_without_an_account():
    recipe = dy.Recipe.from_lightning(Plain())
    recipe = replace(recipe, optimizer=lambda ps: torch.optim.AdamW(list(ps)[2:], lr=0.05))
    found = dy.attribute_training(
        recipe,
        None,
        BATCHES[:3],
        each_tensor(recipe.model),
        {"p": BATCHES[3]},
        margin,
        sources=lambda b: b[1].tolist(),
    )
    assert not found["attribution"].sel(site=["body.weight", "body.bias"]).any()
    expect_sums(found, at_most=0.01)


def test_muon_has_steps_and_sites_but_no_sources():
    def muon(parameters):
        return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=0.01)

    net = torch.nn.Sequential(
        torch.nn.Linear(5, 8, bias=False), torch.nn.Tanh(), torch.nn.Linear(8, 3, bias=False)
    )
    recipe = dy.Recipe(net.double(), lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]), muon)
    given = (recipe, None, BATCHES, each_tensor(net), {"p": BATCHES[3]}, margin)
    expect_sums(dy.attribute_training(*given), at_most=0.01)
    with pytest.raises(RecipeError, match="Muon is not AdamW, Adam or SGD"):
        dy.attribute_training(*given, sources=partial(lambda b: b[1].tolist()))
