"""Levels of sites: which of them divide the parameters without rest, and what their gradients add up to."""

from itertools import pairwise

import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.trees import exchanged
from tests.zoo.small_models import tokens, trained, transformer, transformer_recipe

SHAPES = {
    "layer norm": {},
    "rms norm": {"normalization": "RMS"},
    "no norm": {"normalization": "none"},
    "attention only": {"attn_only": True},
    "one head": {"n_heads": 1},
    "one layer": {"n_layers": 1},
    "eleven layers": {"n_layers": 11, "d_model": 4, "d_head": 2, "d_mlp": 3},
}


def times_covered(model, parts):
    """How often each element of each parameter is covered: {name: counts}."""
    counts = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for site in parts:
        for name, index in site.covers.items():
            counts[name][index] += 1
    return counts


@pytest.mark.parametrize("level", ["matrices", "components", "parameters"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_components_and_parameters_cover_every_element_exactly_once(level, shape):
    model = transformer(**SHAPES[shape])
    parts = getattr(sites, level)(model)
    sites.check(parts, model)
    assert all((count == 1).all() for count in times_covered(model, parts).values())


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_cover_the_attention_but_its_output_bias_exactly_once(shape):
    model = transformer(**SHAPES[shape])
    for name, count in times_covered(model, sites.heads(model)).items():
        inside = ".attn." in name and not name.endswith("b_O")
        assert (count == inside).all(), name


def test_the_two_circuits_of_a_head_make_up_the_head():
    model = transformer()
    heads, circuits = (times_covered(model, parts) for parts in (sites.heads(model), sites.circuits(model)))
    assert all(torch.equal(heads[name], circuits[name]) for name in heads)


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_cover_the_blocks_exactly_once_and_nothing_else(shape):
    model = transformer(**SHAPES[shape])
    for name, count in times_covered(model, sites.layers(model)).items():
        assert (count == name.startswith("blocks.")).all(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_up_to_layer_only_grows_from_the_embeddings_to_everything(shape):
    model = transformer(**SHAPES[shape])
    steps = sites.up_to_layer(model)
    counts = [times_covered(model, [site]) for site in steps]
    assert set(steps[0].covers) == {"embed.W_E", "pos_embed.W_pos"}
    assert all((count == 1).all() for count in counts[-1].values())
    for before, after in pairwise(counts):
        assert all((after[name] >= before[name]).all() for name in before)
        assert any((after[name] > before[name]).any() for name in before)


@pytest.mark.parametrize("level", [level for level in sites.LEVELS if level != "up_to_layer"])
def test_coordinates_name_the_layer_and_head_that_a_site_covers(level):
    model = transformer(n_layers=11, n_heads=3, d_model=4, d_head=2, d_mlp=3)
    for site in sites.LEVELS[level](model):
        assert site.coords["level"] == level
        if site.coords["layer"] >= 0:
            assert all(name.startswith(f"blocks.{site.coords['layer']}.") for name in site.covers)
        if site.coords["head"] >= 0:
            assert set(site.covers.values()) == {(site.coords["head"],)}
        if site.coords["layer"] < 0:
            assert not any(name.startswith("blocks.") for name in site.covers)


@pytest.fixture(scope="module")
def differences():
    """Gradients of a base and a source batch, and the model they belong to."""
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last
    base, source = (dy.steps.gradient(recipe, checkpoint, tokens(seed)).gradients for seed in (2, 3))
    return recipe.model, base, source


@pytest.mark.parametrize("level", ["matrices", "components", "parameters"])
def test_differences_exchanged_by_a_partition_add_up_to_the_whole_difference(differences, level):
    model, base, source = differences
    whole = {name: source[name] - base[name] for name in base}
    total = {name: torch.zeros_like(g) for name, g in base.items()}
    for site in getattr(sites, level)(model):
        for name, g in exchanged(base, source, site.covers).items():
            total[name] += g - base[name]
    assert max(float((total[name] - whole[name]).abs().max()) for name in whole) < 1e-12
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-2


def test_differences_exchanged_head_by_head_add_up_to_the_layers(differences):
    model, base, source = differences
    heads = sites.heads(model)
    for layer in range(2):
        names = [n for n in base if n.startswith(f"blocks.{layer}.attn.") and not n.endswith("b_O")]
        layers_own = [site for site in heads if site.coords["layer"] == layer]
        for name in names:
            total = sum(exchanged(base, source, site.covers)[name] - base[name] for site in layers_own)
            assert float((total - (source[name] - base[name])).abs().max()) < 1e-12
