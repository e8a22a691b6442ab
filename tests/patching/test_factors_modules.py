"""Factors of layers that are more than one product, and of those that declare what they are made of."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.models.projections import Projection
from dynamics.sites import SiteError
from tests.zoo.signal_models import (
    RECIPES,
    REVEALING,
    ConvNet,
    LastState,
    Lstm,
    begun,
    contrast_of,
    covering,
    filled,
    made,
    off,
    revealed,
    revealed_factors,
    sequences,
    zero,
)
from tests.zoo.small_models import (
    classifier_recipe,
    points,
    trained,
)

FACTORS = ("x", "delta", "both")


# --- modules that are more than one product ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "convolutions"])
def test_a_layer_that_is_more_than_one_product_has_its_gradient_pulled_back_through_it(kind):
    """One run's arguments, the other run's signal at its output; by autograd on the layer alone."""
    recipe, pair = RECIPES[kind](), contrast_of(kind)
    name = {"LSTM": "lstm", "convolutions": "second"}[kind]
    layer = recipe.model.get_submodule(name)
    parts = dict(layer.named_parameters(prefix=name))
    reads, signals = [], []
    for batch in (pair.base, pair.source):
        handle = layer.register_forward_pre_hook(lambda _, inputs: reads.append(inputs[0].detach().clone()))
        signals.append(dy.cache(recipe, None, batch, name).signals[name])
        handle.remove()
    found = revealed_factors(recipe, None, pair, [covering(*parts)])
    for factor, (i, j) in {"x": (1, 0), "delta": (0, 1), "both": (1, 1)}.items():
        out = layer(reads[i])
        gradient = torch.autograd.grad(out[0] if kind == "LSTM" else out, parts.values(), signals[j])
        expected = dict(zip(parts, gradient, strict=True))
        assert off({n: found["layer", factor][n] for n in parts}, expected) < 1e-12
        assert off(found["layer", factor], found["base"]) > 1e-3


@pytest.mark.parametrize("name", ["first.weight", "second.bias", "head.weight"])
def test_a_convolution_has_no_positions(name):
    recipe, pair = RECIPES["convolutions"](), contrast_of("convolutions")
    located = sites.at_positions([covering(name)], {"1": 1})
    for verb in (dy.patch_factors, dy.patch_gradients):
        with pytest.raises(SiteError, match=r"mixes positions|it writes"):
            verb(recipe, None, [pair], located, zero)


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias"])
def test_batch_normalisation_of_images_has_no_positions(name):
    recipe, pair = RECIPES["convolutions"](), contrast_of("convolutions")
    with pytest.raises(SiteError):
        dy.patch_factors(recipe, None, [pair], sites.at_positions([covering(name)], {"1": 1}), zero)


@pytest.mark.parametrize("positions", [(1,), (3,), (1, 2, 3)])
@pytest.mark.parametrize("name", ["lstm.weight_ih_l0", "lstm.bias_hh_l1"])
def test_an_lstm_has_no_positions_but_what_stands_below_and_above_it_has(name, positions):
    recipe, pair = RECIPES["LSTM"](), contrast_of("LSTM")
    located = sites.at_positions([covering(name)], {"here": positions})
    for verb in (dy.patch_factors, dy.patch_gradients):
        with pytest.raises(SiteError, match=r"'lstm' mixes positions.*Leave out positions"):
            verb(recipe, None, [pair], located, zero)
    beside = sites.at_positions([covering("embed.weight", "head.weight")], {"here": positions})
    found = revealed(dy.patch_gradients, recipe, None, pair, beside)
    assert off(found["layer @ here"], found["base"]) > 1e-3


def test_dropout_between_the_layers_of_an_mlp_is_the_same_in_both_runs_and_in_the_factors():
    recipe, pair = RECIPES["MLP relu dropout"](), contrast_of("MLP")
    checkpoint = begun(recipe, "MLP").last
    names = [n for n, _ in recipe.model.named_parameters()]
    found = revealed_factors(recipe, checkpoint, pair, [covering(*names)])
    assert off(found["layer", "both"], found["source"]) < 1e-12


def test_a_layer_that_drops_units_of_its_own_has_factors():
    recipe = dy.Recipe(made(lambda: Lstm(dropout=0.3)), dy.measures.cross_entropy, REVEALING)
    lstm = [n for n, _ in recipe.model.named_parameters() if n.startswith("lstm")]
    found = revealed_factors(recipe, None, contrast_of("LSTM"), [covering(*lstm)])
    expected = {n: found["source"][n] for n in lstm}
    assert off({n: found["layer", "both"][n] for n in lstm}, expected) < 1e-12


@pytest.mark.parametrize(
    "mode",
    [
        "train",
        pytest.param(
            "eval",
        ),
    ],
)
def test_batch_normalisation_has_factors_at_a_checkpoint_whose_statistics_are_not_the_models(mode):
    recipe = classifier_recipe(model=made(ConvNet), optimizer=REVEALING)
    checkpoint = begun(recipe, "convolutions").last
    recipe.model.norm.train(mode == "train")
    pair = contrast_of("convolutions")
    found = revealed_factors(recipe, checkpoint, pair, [covering("norm.weight", "norm.bias")])
    for name in ("norm.weight", "norm.bias"):
        assert off({"": found["layer", "both"][name]}, {"": found["source"][name]}) < 1e-12


def test_a_users_own_hook_on_a_layers_inputs_is_applied_once():
    recipe, pair = classifier_recipe(optimizer=REVEALING), contrast_of("MLP")
    recipe.model.head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    found = revealed_factors(recipe, None, pair, [covering("head.weight")])
    assert off({"": found["layer", "both"]["head.weight"]}, {"": found["source"]["head.weight"]}) < 1e-12


def test_a_users_own_hook_on_a_layers_output_is_part_of_the_layer():
    recipe, pair = classifier_recipe(optimizer=REVEALING), contrast_of("MLP")
    recipe.model.head.register_forward_hook(lambda _, __, out: out * 2)
    found = revealed_factors(recipe, None, pair, [covering("head.weight")])
    assert off({"": found["layer", "both"]["head.weight"]}, {"": found["source"]["head.weight"]}) < 1e-12


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_an_embedding_with_sparse_gradients_keeps_no_layer_from_its_factors(name):
    recipe, pair = RECIPES["tied"](), contrast_of("tied")
    embed = nn.Embedding.from_pretrained(recipe.model.embed.weight.detach(), freeze=False, sparse=True)
    recipe = dataclasses.replace(recipe, model=nn.Sequential(embed, nn.Linear(6, 11).double()))
    name = {"embed.weight": "0.weight", "head.weight": "1.weight"}[name]
    found = revealed_factors(recipe, None, pair, [covering(name)])
    assert off({"": found["layer", "both"][name]}, {"": found["source"][name]}) < 1e-12


# --- declared projections ---------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A gain beside a submodule; undeclared it has no factors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.layer(x) * self.gain


class Declared(Scaled):
    def projections(self):
        return [Projection(("gain",), lambda p, h: h * p["gain"], reads="layer")]


class Holder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.scaled = kind()
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.scaled(x).tanh())


def test_a_parameter_without_a_projection_is_refused_until_its_module_declares_one():
    pair = contrast_of("MLP")
    recipe = classifier_recipe(model=made(lambda: Holder(Scaled)), optimizer=REVEALING)
    with pytest.raises(SiteError, match=r"'scaled.gain' belongs to no projection.*projections\(\)"):
        dy.patch_factors(recipe, None, [pair], [covering("scaled.gain")], zero)
    recipe = classifier_recipe(model=made(lambda: Holder(Declared)), optimizer=REVEALING)
    found = revealed_factors(recipe, None, pair, [covering("scaled.gain")])
    x, delta = [], []
    for batch in (pair.base, pair.source):
        kept = dy.cache(recipe, None, batch)
        x.append(kept.activations["scaled.layer"])
        delta.append(kept.signals["scaled"])
    for factor, (i, j) in {"x": (1, 0), "delta": (0, 1), "both": (1, 1)}.items():
        expected = (x[i] * delta[j]).sum(0)
        assert off({"": found["layer", factor]["scaled.gain"]}, {"": expected}) < 1e-13
    found = revealed_factors(recipe, None, pair, [covering("scaled.layer.weight")])
    assert off(found["layer", "both"], found["base"]) > 1e-3


def test_a_loss_that_reads_an_lstms_last_state_has_no_factors_for_it():
    """More of its output is read than the first tensor."""

    recipe = classifier_recipe(model=made(LastState), optimizer=REVEALING)
    pair = dy.Contrast(sequences(1), sequences(2), sequences(3))
    with pytest.raises(SiteError, match="the loss reads more of its module's output than the first tensor"):
        dy.patch_factors(recipe, None, [pair], [covering("lstm.weight_ih_l0")], zero)
    dy.patch_factors(recipe, None, [pair], [covering("head.weight")], zero)


def test_factors_of_a_checkpoint_are_those_of_its_own_weights():
    recipe = classifier_recipe(optimizer=REVEALING)
    live = trained(recipe, [points(0), points(1)])
    pair = contrast_of("MLP")
    site = covering("encoder.weight", "head.bias")
    one = revealed_factors(recipe, live.last, pair, [site])
    twin = dataclasses.replace(recipe, model=copy.deepcopy(live.model))
    other = revealed_factors(twin, None, pair, [site])
    for factor in FACTORS:
        assert off(one["layer", factor], other["layer", factor]) < 1e-14
    source = filled(live.model, dy.steps.gradient(recipe, live.last, pair.source).gradients)
    for name in site.covers:
        assert off({"": one["layer", "both"][name]}, {"": source[name]}) < 1e-12
