"""What patch_signals cannot do, it says: what was found, what was expected, what to do."""

import dataclasses

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.recipe import RecipeError
from dynamics.sites import Site, SiteError
from tests.zoo.signal_models import ALL, RECIPES, REVEALING, contrast_of, made, toy_recipe, zero
from tests.zoo.small_models import classifier_loss, classifier_recipe, margin, points, tokens

HOOK = "blocks.1.attn.hook_z"


def patch(*covers, pair=None, recipe=None, **keywords):
    recipe = recipe or toy_recipe()
    patched = [Site(f"site {i}", {HOOK: ...} if c is None else c) for i, c in enumerate(covers)]
    return dy.patch_signals(recipe, None, [pair or contrast_of("LN gelu")], patched, zero, **keywords)


@pytest.mark.parametrize(
    ("covers", "message"),
    [
        (
            {"blocks.2.hook_resid_pre": ...},
            r"'site 0' covers 'blocks.2.hook_resid_pre', which is no submodule",
        ),
        ({"blocks.0.attn.W_Q": ...}, r"which is no submodule with an output.*sites.activations"),
        ({"": ...}, r"covers '', which is no submodule"),
        ({"blocks": ...}, r"covers 'blocks', which is no submodule"),
        ({}, r"Site 'site 0' covers nothing"),
        ({HOOK: (ALL, ALL, 2)}, r"reads index 2 on axis 2 of 'blocks.1.attn.hook_z', which has 2"),
        ({HOOK: (ALL, -5)}, r"reads index -5 on axis 1"),
        ({HOOK: (ALL, slice(0, 9))}, r"slices axis 1 of 'blocks.1.attn.hook_z' to 9, which has 4"),
        ({HOOK: (ALL, slice(3, 3))}, r"takes nothing on axis 1"),
        ({HOOK: (ALL, ALL, ALL, ALL, 0)}, r"indexes 5 axes of 'blocks.1.attn.hook_z', which has shape"),
        ({HOOK: (ALL, torch.tensor([0, 4]))}, r"reads index 4 on axis 1"),
        (
            {HOOK: torch.ones(6, 4, 2, dtype=torch.bool)},
            r"masks.*must be boolean and of shape \(6, 4, 2, 4\)",
        ),
        ({HOOK: torch.ones(6, 4, 2, 4)}, r"masks.*torch.float32.*must be boolean"),
        ({HOOK: [1]}, r"covers \[1\] of 'blocks.1.attn.hook_z'; it must be"),
    ],
)
def test_a_site_that_the_activation_does_not_have_is_refused_by_name(covers, message):
    with pytest.raises(SiteError, match=message):
        patch(covers)


def test_a_label_that_occurs_twice_is_refused():
    site = Site("z", {HOOK: ...})
    with pytest.raises(SiteError, match=r"'?z'? occur more than once"):
        dy.patch_signals(toy_recipe(), None, [contrast_of("LN gelu")], [site, site], zero)


@pytest.mark.parametrize("forward", ["base", "source"])
@pytest.mark.parametrize("index", [..., (ALL, 1)], ids=["whole", "a position"])
def test_batches_of_different_shapes_are_refused_with_both_shapes(forward, index):
    pair = dy.Contrast(tokens(10), tokens(11, rows=5), tokens(12))
    with pytest.raises(
        SiteError, match=r"\(6, 4, 2, 4\) in the base run and \(5, 4, 2, 4\) in the source run"
    ):
        patch({HOOK: index}, pair=pair, forward=forward)


def test_a_glob_of_activations_that_matches_nothing_is_refused():
    with pytest.raises(SiteError, match=r"no submodule matches 'hook_resid'"):
        sites.activations(toy_recipe().model, "hook_resid")


def test_a_module_that_does_not_run_is_refused():
    recipe = RECIPES["odd"]()
    with pytest.raises(SiteError, match=r"'idle', which gave no floating-point tensor in the source run"):
        patch({"idle": ...}, recipe=recipe)


class Counted(nn.Module):
    """Its layer runs once, and again where the batch begins with a positive number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.layer(x)
        if x.sum() > 0:
            x = self.layer(x[:, :5])
        return self.head(x)


def once_and_twice():
    recipe = classifier_recipe(model=made(Counted), optimizer=REVEALING)
    kinds = {}
    for seed in range(20):
        kinds.setdefault("layer[1]" in dy.cache(recipe, None, points(seed)).signals, points(seed))
    return recipe, kinds[False], kinds[True]


def test_a_module_that_runs_more_often_in_the_base_run_is_refused():
    recipe, once, twice = once_and_twice()
    with pytest.raises(SiteError, match=r"'layer' runs 2 times in the base run and 1 times"):
        patch({"layer": ...}, recipe=recipe, pair=dy.Contrast(twice, once, points(3)))


def test_a_module_that_runs_more_often_in_the_source_run_is_refused():
    recipe, once, twice = once_and_twice()
    with pytest.raises(SiteError):
        patch({"layer": ...}, recipe=recipe, pair=dy.Contrast(once, twice, points(3)))


class Shrinking(nn.Module):
    """Its layer runs on all rows, and then on three of them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x)) + self.layer(x[:3]).mean()


def test_an_index_outside_a_later_run_is_refused():
    recipe = classifier_recipe(model=made(Shrinking), optimizer=REVEALING)
    with pytest.raises(SiteError):
        patch({"layer": (5,)}, recipe=recipe, pair=contrast_of("MLP"))


def test_a_forward_that_is_neither_run_is_refused():
    with pytest.raises(ValueError, match="forward"):
        patch(None, forward="sauce")


def test_positions_of_a_parameter_site_are_refused():
    """An activation's own positions are part of its index."""
    recipe = toy_recipe()
    patched = sites.at_positions(sites.activations(recipe.model, HOOK), {"tag": 0})
    with pytest.raises(SiteError, match="position"):
        dy.patch_signals(recipe, None, [contrast_of("LN gelu")], patched, zero)


def test_a_module_with_a_bracket_in_its_name_is_a_module_like_any_other():
    model = nn.Sequential()
    model.add_module("layer[a]", nn.Linear(5, 3))
    recipe = classifier_recipe(model=model.double(), optimizer=REVEALING)
    result = dy.patch_signals(recipe, None, [contrast_of("MLP")], [Site("layer", {"layer[a]": ...})], margin)
    assert result["effect"].item() != 0


@pytest.mark.parametrize(
    ("missing", "message"), [("loss", "give the recipe loss="), ("optimizer", "give the recipe optimizer=")]
)
def test_a_recipe_without_loss_or_optimizer_is_refused(missing, message):
    recipe = dataclasses.replace(toy_recipe(), **{missing: None})
    with pytest.raises(RecipeError, match=message):
        patch(None, recipe=recipe)


def test_without_contrasts_or_sites_there_is_nothing_to_do():
    recipe = toy_recipe()
    patched = sites.activations(recipe.model, HOOK)
    for contrasts, given, missing in (([], patched, "contrasts"), ([contrast_of("LN gelu")], [], "sites")):
        with pytest.raises(ValueError, match=f"patch_signals was given no {missing}"):
            dy.patch_signals(recipe, None, contrasts, given, zero)


@pytest.mark.parametrize("which", ["base", "source"])
def test_a_loss_that_is_not_finite_names_the_batch(which):
    def loss(model, batch):
        return classifier_loss(model, batch) * (torch.inf if batch is bad else 1.0)

    pair = contrast_of("MLP")
    bad = getattr(pair, which)
    recipe = classifier_recipe(loss=loss)
    with pytest.raises(dy.steps.NonFiniteGradient, match=f"The loss of the {which} batch of contrast 0"):
        dy.patch_signals(recipe, None, [pair], [Site("encoder", {"encoder": ...})], margin)
