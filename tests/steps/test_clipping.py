"""Clipping: every site's coefficient follows from additive norms, and equals torch's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.recipe import ByNorm, ByValue
from dynamics.steps.clipping import clipped, coefficient
from dynamics.trees import exchanged, squared_norm
from tests.zoo.small_models import draws, examples, tokens, trained, transformer_recipe

norms = st.floats(0, 1e12)
limits = st.floats(1e-6, 1e6)


def torch_coefficient(gradients, max_norm):
    """The factor that torch's clip_grad_norm_ applies to these gradients."""
    parameters = []
    for g in (*gradients.values(), torch.zeros(1, dtype=torch.float64)):
        if g is not None:
            parameters.append(nn.Parameter(torch.zeros_like(g)))
            parameters[-1].grad = g.clone()
    largest = max(range(len(parameters)), key=lambda i: float(parameters[i].grad.abs().max()))
    before = parameters[largest].grad.abs().max().item()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    return parameters[largest].grad.abs().max().item() / before


@pytest.fixture(scope="module")
def gradients():
    """Of a base and a source batch at the same point."""
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last
    base, source = (dy.steps.gradient(recipe, checkpoint, tokens(seed)).gradients for seed in (2, 3))
    return recipe.model, base, source


@pytest.mark.parametrize("level", sites.LEVELS)
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6])
def test_the_clip_coefficient_from_additive_norms_is_torchs_at_every_site(gradients, level, max_norm):
    model, base, source = gradients
    factors = set()
    for site in sites.LEVELS[level](model):
        patched = exchanged(base, source, site.covers)
        inside = sum(squared_norm(source[name][index]) for name, index in site.covers.items())
        outside = sum(squared_norm(base[name]) for name in base) - sum(
            squared_norm(base[name][index]) for name, index in site.covers.items()
        )
        factor = coefficient(inside + outside, max_norm)
        assert factor == pytest.approx(torch_coefficient(patched, max_norm), rel=1e-12)
        name = "unembed.W_U"
        assert torch.equal(
            clipped(patched, ByNorm(max_norm), patched)[name],
            patched[name] * coefficient(sum(squared_norm(g) for g in patched.values()), max_norm),
        )
        factors.add(factor)
    assert (factors == {1.0}) == (max_norm == 1e6)


def test_a_norm_is_accumulated_in_double_precision():
    single = torch.full((2**20,), 0.1, dtype=torch.float32)
    exact = 2**20 * float(torch.tensor(0.1)) ** 2
    assert squared_norm(single) == pytest.approx(exact, rel=1e-14)
    one_dominates = {"large": torch.tensor([1e6]), "small": torch.full((1000,), 1e-2)}
    assert sum(squared_norm(g) for g in one_dominates.values()) == pytest.approx(1e12 + 0.1, rel=1e-14)


@examples
@given(norm=norms, limit=limits)
def test_clipping_never_lengthens_a_gradient_and_never_leaves_it_longer_than_the_limit(norm, limit):
    factor = coefficient(norm**2, limit)
    assert 0 < factor <= 1
    assert factor * norm <= limit * (1 + 1e-12)


@examples
@given(norm=norms, limit=limits)
def test_a_gradient_well_inside_the_limit_is_not_touched(norm, limit):
    if norm + 1e-6 <= limit * (1 - 1e-12):
        assert coefficient(norm**2, limit) == 1.0


@examples
@given(one=norms, other=norms, limit=limits)
def test_a_longer_gradient_is_never_scaled_less(one, other, limit):
    short, long = sorted((one, other))
    assert coefficient(long**2, limit) <= coefficient(short**2, limit)


@examples
@given(norm=norms, low=limits, high=limits)
def test_a_higher_limit_never_clips_more(norm, low, high):
    assert coefficient(norm**2, min(low, high)) <= coefficient(norm**2, max(low, high))


@pytest.mark.parametrize("clip", [None, ByNorm(1e9), ByNorm(0.3), ByValue(0.3), ByValue(1e9)])
def test_clipping_keeps_what_is_missing_missing_and_changes_no_given_tensor(clip):
    g = torch.randn(5, 3, generator=draws(0), dtype=torch.float64)
    given_gradients = {"a": g.clone(), "none": None, "b": torch.zeros(2, dtype=torch.float64)}
    found = clipped(given_gradients, clip, given_gradients)
    assert list(found) == ["a", "none", "b"]
    assert found["none"] is None
    assert torch.equal(given_gradients["a"], g)
    assert torch.equal(found["b"], torch.zeros(2, dtype=torch.float64))
    if clip is None or clip in (ByNorm(1e9), ByValue(1e9)):
        assert torch.equal(found["a"], g)
    elif isinstance(clip, ByValue):
        assert torch.equal(found["a"], g.clamp(-0.3, 0.3))
    else:
        assert float(found["a"].norm()) == pytest.approx(
            0.3 * (1 - 1e-6 / (float(g.norm()) + 1e-6)), rel=1e-12
        )


def test_the_coefficient_by_hand():
    assert coefficient(25.0, 2.0) == 2.0 / (5.0 + 1e-6)
    assert coefficient(0.0, 2.0) == 1.0
    assert math.isclose(coefficient(1e24, 1.0), 1e-12, rel_tol=1e-12)
