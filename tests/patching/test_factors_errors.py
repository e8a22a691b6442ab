"""What patch_factors and positions cannot do, they say: what was found, what was expected, what to do."""

import dataclasses

import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.recipe import RecipeError
from dynamics.sites import Site, SiteError
from tests.zoo.signal_models import RECIPES, REVEALING, contrast_of, toy_recipe, zero
from tests.zoo.small_models import classifier_recipe, points, tokens

WEIGHT = "blocks.0.mlp.W_in"


def at(positions, name=WEIGHT):
    return sites.at_positions([Site("layer", {name: ...})], {"here": positions})


@pytest.mark.parametrize(
    ("covers", "message"),
    [
        ({"blocks.0.mlp.W": ...}, r"'layer' covers 'blocks.0.mlp.W', but the model has"),
        ({"blocks.0.hook_resid_pre": ...}, r"covers 'blocks.0.hook_resid_pre', but the model has"),
        ({"blocks.0.attn.W_Q": (2,)}, r"reads index 2 on axis 0 of 'blocks.0.attn.W_Q', which has 2"),
        ({}, "covers nothing"),
    ],
)
def test_a_site_that_the_model_does_not_have_is_refused_by_name(covers, message):
    with pytest.raises(SiteError, match=message):
        dy.patch_factors(toy_recipe(), None, [contrast_of("LN gelu")], [Site("layer", covers)], zero)


@pytest.mark.parametrize("name", ["embed.W_E", "blocks.0.attn.W_O", WEIGHT, "ln_final.w", "unembed.b_U"])
def test_batches_of_different_shapes_have_no_corners_and_the_error_has_both_shapes(name):
    site = Site("layer", {name: ...})
    pair = dy.Contrast(tokens(10), tokens(11, rows=5), tokens(12))
    with pytest.raises(SiteError, match=r"writes \(5, 4, .*in one run and \(6, 4, .*pad them"):
        dy.patch_factors(toy_recipe(), None, [pair], [site], zero)


def test_batches_of_different_lengths_have_no_corners():
    short = tokens(11)
    short = dataclasses.replace(short, tokens=short.tokens[:, :3], target_pos=short.target_pos.clamp(max=2))
    pair = dy.Contrast(tokens(10), short, tokens(12))
    with pytest.raises(SiteError, match=r"writes \(6, 3, 12\) in one run and \(6, 4, 12\)"):
        dy.patch_factors(toy_recipe(), None, [pair], [Site("layer", {WEIGHT: ...})], zero)


@pytest.mark.parametrize("positions", [4, -5, [0, 9]])
def test_a_position_that_the_sequence_does_not_have_is_refused(positions):
    for verb in (dy.patch_factors, dy.patch_gradients):
        with pytest.raises(SiteError, match=r"positions .* of 'blocks.0.mlp': it writes \(6, 4, 12\)"):
            verb(toy_recipe(), None, [contrast_of("LN gelu")], at(positions), zero)


def test_a_model_without_sequences_has_no_positions():
    recipe, pair = classifier_recipe(), contrast_of("MLP")
    for verb in (dy.patch_factors, dy.patch_gradients):
        with pytest.raises(SiteError, match=r"positions \[0\] of 'encoder': it writes \(7, 8\)"):
            verb(recipe, None, [pair], at(0, "encoder.weight"), zero)


@pytest.mark.parametrize("verb", [dy.patch_factors, dy.patch_gradients])
def test_a_parameter_of_the_root_beside_its_layers_has_no_factors(verb):
    recipe, pair = classifier_recipe(), contrast_of("MLP")
    patched = at(0, "temperature") if verb is dy.patch_gradients else [Site("t", {"temperature": ...})]
    with pytest.raises(SiteError, match=r"'temperature' belongs to no projection that ran.*projections\(\)"):
        verb(recipe, None, [pair], patched, zero)


def test_a_parameter_without_factors_does_not_keep_others_from_theirs():
    result = dy.patch_factors(
        classifier_recipe(), None, [contrast_of("MLP")], [Site("h", {"head.weight": ...})], zero
    )
    assert result["effect"].shape == (1, 1, 3)


def test_a_parameter_that_is_used_without_its_module_being_called_is_refused():
    def loss(model, batch):
        return dy.measures.cross_entropy(model, batch) + 0.01 * model.unembed.W_U.square().sum()

    recipe = dataclasses.replace(toy_recipe(), loss=loss)
    with pytest.raises(SiteError, match=r"'unembed.W_U' do not make up its gradient: it is used where"):
        dy.patch_factors(recipe, None, [contrast_of("LN gelu")], [Site("u", {"unembed.W_U": ...})], zero)
    dy.patch_factors(recipe, None, [contrast_of("LN gelu")], [Site("w", {WEIGHT: ...})], zero)


def test_a_parameter_in_no_loss_has_no_factor_to_exchange():
    recipe, pair = RECIPES["odd"](), contrast_of("odd")
    result = dy.patch_factors(recipe, None, [pair], [Site("idle", {"idle.weight": ...})], zero)
    assert (result["effect"] == 0).all()


def test_patch_updates_refuses_positions():
    """An update is no sum over positions."""
    with pytest.raises(SiteError, match="position"):
        dy.patch_updates(toy_recipe(), None, [contrast_of("LN gelu")], at(0), zero)


@pytest.mark.parametrize("where", [torch.tensor(1), points(0)[1].numpy()[0]], ids=["torch", "numpy"])
def test_a_position_may_be_any_integer_such_as_one_of_target_pos(where):
    assert at(where)[0].positions == (int(where),)


@pytest.mark.parametrize(
    ("missing", "message"), [("loss", "give the recipe loss="), ("optimizer", "give the recipe optimizer=")]
)
def test_a_recipe_without_loss_or_optimizer_is_refused(missing, message):
    recipe = dataclasses.replace(toy_recipe(), **{missing: None})
    with pytest.raises(RecipeError, match=message):
        dy.patch_factors(recipe, None, [contrast_of("LN gelu")], [Site("w", {WEIGHT: ...})], zero)


def test_without_contrasts_or_sites_there_is_nothing_to_do():
    recipe, pair = toy_recipe(), contrast_of("LN gelu")
    for contrasts, given, missing in (([], [Site("w", {WEIGHT: ...})], "contrasts"), ([pair], [], "sites")):
        with pytest.raises(ValueError, match=f"patch_factors was given no {missing}"):
            dy.patch_factors(recipe, None, contrasts, given, zero)


@pytest.mark.parametrize("which", ["base", "source"])
def test_a_loss_that_is_not_finite_names_the_batch(which):
    pair = contrast_of("LN gelu")
    bad = getattr(pair, which)

    def loss(model, batch):
        return dy.measures.cross_entropy(model, batch) * (torch.inf if batch is bad else 1.0)

    recipe = dataclasses.replace(toy_recipe(), loss=loss, optimizer=REVEALING)
    with pytest.raises(dy.steps.NonFiniteGradient, match=f"The loss of the {which} batch of contrast 0"):
        dy.patch_factors(recipe, None, [pair], [Site("w", {WEIGHT: ...})], zero)
