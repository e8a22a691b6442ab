"""The key bias shifts all of a query's scores alike, so nothing can be learned through it."""

import pytest

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from tests.zoo.small_models import gap, outcomes, tokens, trained, transformer, transformer_recipe


def key_biases(model):
    """One site for each head's key bias, and one for all of them."""
    names = [name for name, _ in model.named_parameters() if name.endswith("b_K")]
    one_by_one = [Site(f"{name} {head}", {name: (head,)}) for name in names for head in range(2)]
    return [*one_by_one, Site("all", dict.fromkeys(names, ...))]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_gradient_of_the_key_bias_is_zero_up_to_rounding(dtype):
    recipe = transformer_recipe(model=transformer(dtype))
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last
    found = dy.steps.gradient(recipe, checkpoint, tokens(2)).gradients
    rounding = 1e-15 if dtype == "float64" else 1e-6
    for layer in range(2):
        assert float(found[f"blocks.{layer}.attn.b_K"].abs().max()) < rounding
        assert float(found[f"blocks.{layer}.attn.b_Q"].abs().max()) > 1e-4


@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])
@pytest.mark.parametrize("start", ["fresh", "stored"])
def test_exchanging_the_key_bias_has_no_effect_up_to_rounding(verb, start):
    recipe = transformer_recipe()
    live = trained(recipe, [tokens(0), tokens(1), tokens(5)])
    checkpoint = live.last if start == "stored" else live.last.with_fresh_optimizer()
    pair = dy.Contrast(tokens(2), tokens(3), tokens(4))
    controls = [s for s in sites.matrices(recipe.model) if s.coords["component"] in ("W_K", "W_Q")]
    result = verb(
        recipe, checkpoint, [pair], [*key_biases(recipe.model), *controls], dy.measures.correct_logit
    )
    effects = abs(result["effect"].isel(example=0))
    assert effects[:5].max() < 1e-12
    assert effects[5:].min() > 1e-8


def test_in_single_precision_a_fresh_optimizer_moves_the_key_bias_and_the_effect_stays_at_rounding():
    """Adam divides rounding by rounding; the scores it shifts are still shifted all alike."""
    recipe = transformer_recipe(model=transformer("float32"))
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last.with_fresh_optimizer()
    pair = dy.Contrast(tokens(2), tokens(3), tokens(4))
    biases = key_biases(recipe.model)
    found = outcomes(dy.patch_updates, recipe, checkpoint, pair, biases)
    names = biases[-1].covers
    by_gradient = gap({n: found["base"][n] for n in names}, {n: found["coasted"][n] for n in names})
    assert by_gradient > 1e-3
    result = dy.patch_updates(recipe, checkpoint, [pair], biases, dy.measures.correct_logit)
    assert abs(result["effect"]).max() < 1e-5 * abs(result["base"]).item()
