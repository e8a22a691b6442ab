"""Distances and cosines of weights and updates, against numpy on concatenated slices."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.comparison import compare_updates, compare_weights
from dynamics.recipe import RecipeError
from tests.zoo.comparison_models import jittered

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def flat(state, site):
    """What a site covers of a checkpoint, as one vector."""
    return np.concatenate(
        [state.parameters[name][index].numpy().ravel() for name, index in site.covers.items()]
    )


def angle(x, y):
    return x @ y / np.sqrt(x @ x) / np.sqrt(y @ y)


@pytest.mark.parametrize("level", ["layers", "heads", "circuits", "matrices", "components"])
def test_weights_are_those_of_numpy_on_the_slices_of_every_level(recipe, pair, level):
    chosen = sites.LEVELS[level](recipe.model)
    found = compare_weights(*pair, recipe, chosen)
    for i, site in enumerate(chosen):
        x, y = (flat(state, site) for state in pair)
        here = found.isel(site=i)
        assert here["site"].item() == site.label
        np.testing.assert_allclose(here["distance"], np.linalg.norm(y - x), **EXACT)
        np.testing.assert_allclose(here["norm"], np.linalg.norm(x), **EXACT)
        np.testing.assert_allclose(here["relative"], np.linalg.norm(y - x) / np.linalg.norm(x), **EXACT)
        np.testing.assert_allclose(here["cosine"], angle(x, y), **EXACT)


def test_masks_and_repeated_integers_count_each_element_once(recipe, pair):
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[1, 2:5] = True
    site = sites.Site("some", {"unembed.W_U": mask})
    x, y = (flat(state, site) for state in pair)
    assert len(x) == 3
    np.testing.assert_allclose(
        compare_weights(*pair, recipe, [site])["distance"], [np.linalg.norm(y - x)], **EXACT
    )


def test_squared_distances_add_up_over_a_partition(recipe, pair):
    parts = compare_weights(*pair, recipe, sites.matrices(recipe.model))
    whole = compare_weights(*pair, recipe, [sites.everything(recipe.model)])
    np.testing.assert_allclose((parts["distance"] ** 2).sum(), whole["distance"][0] ** 2, rtol=1e-12)


def test_a_checkpoint_lies_at_distance_zero_from_itself_and_a_scaled_one_in_the_same_direction(recipe, pair):
    first = pair[0]
    double = replace(first, parameters={n: 2 * p for n, p in first.parameters.items()})
    chosen = sites.heads(recipe.model)
    assert (compare_weights(first, first, recipe, chosen)["distance"] == 0).all()
    scaled = compare_weights(first, double, recipe, chosen)
    np.testing.assert_allclose(scaled["cosine"], 1, rtol=1e-12)
    np.testing.assert_allclose(scaled["relative"], 1, rtol=1e-12)


def test_a_zero_norm_has_no_ratio_and_no_direction(recipe, pair):
    site = sites.Site("bias", {"unembed.b_U": ...})
    nothing = replace(pair[0], parameters={n: torch.zeros_like(p) for n, p in pair[0].parameters.items()})
    found = compare_weights(nothing, pair[1], recipe, [site])
    assert np.isnan(found["relative"]).all()
    assert np.isnan(found["cosine"]).all()
    assert float(found["distance"][0]) > 0


def test_updates_are_those_of_numpy(recipe, pair):
    start, middle = pair
    end = jittered(middle, 90, 9)
    chosen = sites.matrices(recipe.model)
    found = compare_updates(start, middle, end, recipe, chosen)
    for i, site in enumerate(chosen):
        a, b, c = (flat(state, site) for state in (start, middle, end))
        np.testing.assert_allclose(found["cosine"][i], angle(b - a, c - b), **EXACT)
        np.testing.assert_allclose(found["first"][i], np.linalg.norm(b - a), **EXACT)
        np.testing.assert_allclose(found["second"][i], np.linalg.norm(c - b), **EXACT)


def test_going_back_is_the_opposite_direction(recipe, pair):
    start, middle = pair
    found = compare_updates(start, middle, start, recipe, sites.layers(recipe.model))
    np.testing.assert_allclose(found["cosine"], -1, rtol=1e-12)


def test_nothing_of_the_model_is_changed_and_other_models_are_refused(recipe, pair, sets):
    before = {n: p.detach().clone() for n, p in recipe.model.named_parameters()}
    mode = recipe.model.training
    chosen = sites.components(recipe.model)
    dy.compare(*pair, recipe, sets, chosen)
    assert all(torch.equal(before[n], p) for n, p in recipe.model.named_parameters())
    assert recipe.model.training is mode
    other = replace(pair[0], parameters={"w": torch.zeros(2)})
    with pytest.raises(RecipeError, match="does not fit the recipe's model"):
        compare_weights(other, pair[1], recipe, chosen)
    with pytest.raises(sites.SiteError, match="positions"):
        compare_weights(*pair, recipe, sites.at_positions(chosen, {"first": 0}))
    with pytest.raises(sites.SiteError, match="nowhere"):
        compare_weights(*pair, recipe, [sites.Site("x", {"nowhere": ...})])
