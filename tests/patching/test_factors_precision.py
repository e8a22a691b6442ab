"""Factors under autocast and in single precision, and what the tolerance of their check lets pass."""

import dataclasses

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site, SiteError
from tests.zoo.signal_models import (
    REVEALING,
    contrast_of,
    covering,
    largest,
    off,
    revealed,
    revealed_factors,
    toy_recipe,
    zero,
)
from tests.zoo.small_models import (
    classifier,
    classifier_loss,
    classifier_recipe,
    points,
)

pytestmark = pytest.mark.slow

FACTORS = ("x", "delta", "both")


def in_bf16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return classifier_loss(model, batch)


def single(seed):
    return points(seed, dtype=torch.float32)


def test_under_autocast_the_toys_corners_are_those_of_full_precision_within_bf16():
    pair = contrast_of("LN gelu")
    recipe = toy_recipe()
    recipe.model.float()
    low = dataclasses.replace(recipe, loss=dy.measures.cross_entropy_in_bf16)
    patched = sites.matching(
        recipe.model, {"all": "*", "attention": "*attn*", "mlp": "*mlp*", "out": "unembed*"}
    )
    patched += sites.at_positions(patched, {"1": 1})
    expected, found = (revealed_factors(r, None, pair, patched) for r in (recipe, low))
    scale = largest(expected["base"])
    for site in patched:
        for factor in FACTORS:
            assert off(found[site.label, factor], expected[site.label, factor], scale) < 0.05
    assert off(found["all", "both"], found["source"], scale) < 1e-2
    assert off(found["base"], expected["base"], scale) > 1e-5  # bf16 it is


def test_under_autocast_the_corners_of_linear_layers_are_bf16_products_of_bf16_factors():
    """Rounded once, of inputs and signals that were rounded in the run itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = classifier(dtype=torch.float32)
    recipe = classifier_recipe(model=model, loss=in_bf16, optimizer=REVEALING)
    pair = dy.Contrast(single(10), single(11), single(12))
    patched = [covering("encoder.weight", "encoder.bias")]
    found = revealed_factors(recipe, None, pair, patched)
    x = [b[0].bfloat16() for b in (pair.base, pair.source)]
    delta = [dy.cache(recipe, None, b, "encoder").signals["encoder"] for b in (pair.base, pair.source)]
    for factor, (i, j) in {"x": (1, 0), "delta": (0, 1), "both": (1, 1)}.items():
        product = (delta[j].T @ x[i]).float()
        assert off({"": found["layer", factor]["encoder.weight"]}, {"": product}) < 1e-5


@pytest.mark.parametrize("verb", ["factors", "positions"])
def test_at_one_precision_for_the_whole_model_corners_are_as_good_as_that_precision(verb):
    recipe, pair = toy_recipe(), contrast_of("LN gelu")
    double = Site("all", {n: ... for n, _ in recipe.model.named_parameters()})
    located = sites.at_positions([double], {"1": 1})
    runs = []
    for dtype in (torch.float64, torch.float32):
        recipe.model.to(dtype)
        if verb == "factors":
            found = revealed_factors(recipe, None, pair, [double])
            runs.append({f"{f} {n}": g.double() for f in FACTORS for n, g in found["all", f].items()})
        else:
            found = revealed(dy.patch_gradients, recipe, None, pair, located)
            runs.append({n: g.double() for n, g in found["all @ 1"].items()})
    assert off(runs[1], runs[0]) < 1e-5


class UsedBeside(nn.Module):
    """A layer that is called, and whose weight is also used without calling it."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.mix(x).tanh()
        return self.head(x + 0.3 * nn.functional.linear(x.detach(), self.mix.weight))


@pytest.mark.parametrize(
    ("dtype", "loss"),
    [
        (torch.float64, classifier_loss),
        (torch.float32, classifier_loss),
        pytest.param(
            torch.float32,
            in_bf16,
        ),
    ],
    ids=["fp64", "fp32", "bf16"],
)
def test_a_layer_used_beside_its_call_is_refused_because_its_factors_are_not_all_of_its_gradient(dtype, loss):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = UsedBeside().to(dtype)
    recipe = classifier_recipe(model=model, loss=loss, optimizer=REVEALING)
    pair = dy.Contrast(*(points(seed, dtype=dtype) for seed in range(1, 4)))
    with pytest.raises(SiteError, match=r"the factors of 'mix.weight' do not make up its gradient"):
        dy.patch_factors(recipe, None, [pair], [covering("mix.weight")], zero)
    dy.patch_factors(recipe, None, [pair], [covering("head.weight")], zero)  # the other has nothing to hide


class FullHead(nn.Module):
    """Under autocast its head computes in full precision, as many do for the logits."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.mix(x).tanh()
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


def test_a_layer_that_leaves_autocast_has_its_factors_in_its_own_precision():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FullHead()
    recipe = classifier_recipe(model=model, loss=in_bf16, optimizer=REVEALING)
    pair = dy.Contrast(single(10), single(11), single(12))
    found = revealed_factors(recipe, None, pair, [covering("head.weight")])
    assert off({"": found["layer", "both"]["head.weight"]}, {"": found["source"]["head.weight"]}) < 1e-5
