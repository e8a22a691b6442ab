"""Recipes that see the tag in known places only."""

import json

import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.steps import gradient


@pytest.fixture
def world(alias_task):
    task = alias_task(train_multipliers=1)
    recipe = task.recipe()
    recipe.model.double()
    start = task.config.phases.starts["x2"]
    batch = next(b for b in map(task.batch, range(start, start + 50)) if task.tag_balance(b))
    return task, recipe, dy.steps.states.starting_point(recipe, None), batch


def means(recipe, state, task, batch):
    one, other = (gradient(recipe, state, b).gradients for b in (batch, task.retag(batch)))
    return one, {name: (one[name] + other[name]) / 2 for name in one}


def test_on_blind_sites_the_gradient_is_the_mean_over_both_tags_and_elsewhere_the_batchs_own(world):
    task, recipe, state, batch = world
    own, mean = means(recipe, state, task, batch)
    blind = [*sites.heads(recipe.model)[:2], sites.matching(recipe.model, {"unembed": "unembed.*"})[0]]
    found = gradient(dy.tasks.tag_blind(recipe, task, blind), state, batch)
    head = sites.union(recipe.model, blind).covers
    for name, g in found.gradients.items():
        expected = own[name].clone()
        if name in head:
            expected[head[name]] = mean[name][head[name]]
        assert torch.allclose(g, expected, rtol=0, atol=1e-12), name
    assert found.loss == gradient(recipe, state, batch).loss


def test_a_planted_difference_reaches_its_site_alone(world):
    task, recipe, state, batch = world
    site = sites.heads(recipe.model)[1]
    planted = dy.tasks.planted(recipe, task, site)
    one, other = (gradient(planted, state, b).gradients for b in (batch, task.retag(batch)))
    differing = {name: (one[name] - other[name]).abs() for name in one}
    for name, difference in differing.items():
        if name in site.covers:
            assert difference[site.covers[name]].max() > 0
            difference[site.covers[name]] = 0
        assert difference.max() < 1e-15, name


def test_decoys_add_a_direction_with_the_sign_of_the_tags(world):
    task, recipe, state, batch = world
    site = sites.heads(recipe.model)[1]
    delta = {"unembed.W_U": torch.ones_like(recipe.model.unembed.W_U)}
    without, with_decoys = (
        gradient(dy.tasks.planted(recipe, task, site, decoys), state, batch) for decoys in (None, delta)
    )
    added = {n: with_decoys.gradients[n] - without.gradients[n] for n in with_decoys.gradients}
    assert torch.allclose(
        added.pop("unembed.W_U"), delta["unembed.W_U"] * task.tag_balance(batch) / len(batch)
    )
    assert all(not a.any() for a in added.values())
    assert with_decoys.loss == without.loss
    assert task.tag_balance(task.retag(batch)) == -task.tag_balance(batch)


def test_a_planted_world_takes_the_fast_way_to_its_gradients(world):
    task, recipe, state, _ = world
    delta = {"unembed.W_U": torch.ones_like(recipe.model.unembed.W_U)}
    planted = dy.tasks.planted(recipe, task, sites.heads(recipe.model)[1], delta)
    contrasts, chosen = task.contrasts(), sites.components(recipe.model)
    together = dy.patch_gradients(planted, state, contrasts, chosen, dy.measures.correct_logit)
    assert "vmap(grad)" in json.loads(together.attrs["provenance"])["paths"]["gradients"]
    alone = dy.patch_gradients(planted, state, contrasts[:1], chosen, dy.measures.correct_logit)
    assert torch.allclose(
        torch.tensor(together["effect"].values[:1]), torch.tensor(alone["effect"].values), rtol=0, atol=1e-12
    )
