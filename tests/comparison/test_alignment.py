"""Gradient alignment against ordinary autograd, and what its sign foretells."""

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics import measures, sites, tasks
from dynamics.comparison import align_gradients, align_groups, relations
from dynamics.measures import cross_entropy
from dynamics.recipe import Contrast
from tests.zoo.comparison_models import living, questions

EXACT = {"rtol": 1e-11, "atol": 1e-13}
MEASURES = {m.name: m for m in (measures.correct_log_prob, measures.correct_logit)}


@pytest.fixture
def contrasts():
    return [
        Contrast(questions(i, 2), questions(20 + i, 2), questions(40 + i, 3), {"example": name, "set": group})
        for i, (name, group) in enumerate([("a", "x"), ("b", "x"), ("c", "y"), ("d", "y"), ("e", "y")])
    ]


def gradient(recipe, state, function, batch):
    """By autograd, on a model of its own."""
    model = living(recipe, state)
    function(model, batch).mean().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def cosine(down, up, site):
    x, y = (np.concatenate([g[n][i].ravel() for n, i in site.covers.items() if n in g]) for g in (down, up))
    return -x @ y / np.linalg.norm(x) / np.linalg.norm(y)


@pytest.mark.slow
def test_alignment_is_the_cosine_of_two_ordinary_gradients(recipe, pair, contrasts):
    chosen = [sites.everything(recipe.model), *sites.heads(recipe.model)]
    found = align_gradients(recipe, pair[0], contrasts, chosen, MEASURES)
    for name, measure in MEASURES.items():
        for contrast in contrasts:
            up = gradient(recipe, pair[0], measure, contrast.probe)
            for site in chosen:
                here = found.sel(measure=name, example=contrast.coords["example"], site=site.label)
                for side, batch in (("base", contrast.base), ("source", contrast.source)):
                    down = gradient(recipe, pair[0], cross_entropy, batch)
                    np.testing.assert_allclose(here[side], cosine(down, up, site), **EXACT)
                np.testing.assert_allclose(here["effect"], here["source"] - here["base"], **EXACT)


def test_a_batch_that_is_its_own_probe_is_aligned_with_itself(recipe, pair):
    batch = questions(3)
    found = align_gradients(recipe, pair[0], [Contrast(batch, batch, batch)], sites.components(recipe.model))
    np.testing.assert_allclose(found["base"], 1, rtol=1e-12)


def test_alignment_foretells_what_a_small_step_down_does_to_the_measure(recipe, pair, contrasts):
    found = align_gradients(recipe, pair[0], contrasts, [sites.everything(recipe.model)])
    for i, contrast in enumerate(contrasts):
        down = gradient(recipe, pair[0], cross_entropy, contrast.base)
        up = gradient(recipe, pair[0], measures.correct_log_prob, contrast.probe)
        size = np.sqrt(sum((g**2).sum() for g in down.values()))
        values = []
        for distance in (1e-6, -1e-6):
            model = living(recipe, pair[0])
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p -= distance * torch.from_numpy(down[name]) / size
                values.append(float(measures.correct_log_prob(model, contrast.probe).mean()))
        slope = (values[0] - values[1]) / 2e-6
        steepest = np.sqrt(sum((g**2).sum() for g in up.values()))
        np.testing.assert_allclose(float(found["base"][i, 0]) * steepest, slope, rtol=1e-5, atol=1e-7)


def test_groups_hold_every_pair_and_their_diagonal_is_ones_own(recipe, pair, contrasts):
    chosen = [sites.everything(recipe.model), *sites.matrices(recipe.model)]
    found = align_groups(recipe, pair[0], contrasts, chosen)
    own = align_gradients(recipe, pair[0], contrasts, chosen)
    for side in ("base", "source"):
        diagonal = np.stack([found[side].values[i, i] for i in range(len(contrasts))])
        np.testing.assert_allclose(diagonal, own[side], **EXACT)
    up = gradient(recipe, pair[0], measures.correct_log_prob, contrasts[3].probe)
    for side, batch in (("base", contrasts[0].base), ("source", contrasts[0].source)):
        down = gradient(recipe, pair[0], cross_entropy, batch)
        for site in chosen:
            one = found[side].sel(example="a", other="d", site=site.label)
            np.testing.assert_allclose(one, cosine(down, up, site), **EXACT)
    assert found["other_set"].values.tolist() == ["x", "x", "y", "y", "y"]


@pytest.mark.slow
def test_a_tensor_in_pieces_and_under_several_sites_adds_up_to_the_same(recipe, pair, contrasts, monkeypatch):
    chosen = [sites.everything(recipe.model), *sites.components(recipe.model)]
    whole = align_groups(recipe, pair[0], contrasts, chosen)
    monkeypatch.setattr("dynamics.comparison.alignment.GRAM_ELEMENTS", 35)
    for alone in chosen:
        piecewise = align_groups(recipe, pair[0], contrasts, [alone])
        np.testing.assert_allclose(
            piecewise["base"].isel(site=0), whole["base"].sel(site=alone.label), **EXACT
        )


def test_relations_are_means_over_the_right_pairs(recipe, pair, contrasts):
    matrix = align_groups(recipe, pair[0], contrasts, sites.components(recipe.model))
    found = relations(matrix)
    values = matrix["base"].values
    for i, group in enumerate("xxyyy"):
        within = [values[i, j] for j, other in enumerate("xxyyy") if other == group and j != i]
        across = [values[i, j] for j, other in enumerate("xxyyy") if other != group]
        np.testing.assert_allclose(found["own"][i], values[i, i], **EXACT)
        np.testing.assert_allclose(found["within"][i], np.mean(within, 0), **EXACT)
        np.testing.assert_allclose(found["across"][i], np.mean(across, 0), **EXACT)
    assert set(found.coords) >= {"example", "set", "site", "component"}
    assert not [name for name, coord in found.coords.items() if "other" in coord.dims]
    np.testing.assert_array_equal(relations(matrix, "source")["own"][0], matrix["source"].values[0, 0])
    assert found.attrs == matrix.attrs
    alone = relations(matrix.isel(example=[0], other=[0, 2]))
    assert np.isnan(alone["within"]).all()
    with pytest.raises(ValueError, match="no coordinate 'colour'"):
        relations(matrix, group="colour")


def test_a_gradient_that_is_zero_has_no_direction(recipe, pair, contrasts):
    token = next(t for t in range(9) if not any((c.probe.tokens == t).any() for c in contrasts[:1]))
    site = sites.Site("row", {"embed.W_E": (token,)})
    assert np.isnan(align_gradients(recipe, pair[0], contrasts[:1], [site])["base"]).all()


@pytest.mark.slow
def test_a_sweep_calls_it_at_every_step(run):
    task = tasks.load(run.config)
    recipe = task.recipe()
    chosen = sites.components(recipe.model)
    swept = dy.sweep(
        align_gradients, run, [8, 9], lambda task, _: task.contrasts(), chosen, measures.correct_log_prob
    )
    for step in (8, 9):
        state = dy.steps.reach(recipe, run, step, task.batch)
        alone = align_gradients(recipe, state, task.contrasts(), chosen)
        np.testing.assert_array_equal(swept["effect"].sel(step=step), alone["effect"])


def test_nothing_to_align_is_an_error(recipe, pair, contrasts):
    with pytest.raises(ValueError, match="no contrasts"):
        align_gradients(recipe, pair[0], [], sites.components(recipe.model))
    with pytest.raises(ValueError, match="no sites"):
        align_groups(recipe, pair[0], contrasts, [])
    with pytest.raises(ValueError, match="no measures"):
        align_gradients(recipe, pair[0], contrasts, sites.components(recipe.model), {})


def test_the_model_and_its_mode_are_left_alone(recipe, pair, contrasts):
    recipe.model.train()
    before = {n: p.detach().clone() for n, p in recipe.model.named_parameters()}
    align_gradients(recipe, pair[0], contrasts[:1], sites.components(recipe.model))
    assert recipe.model.training
    assert all(torch.equal(before[n], p) for n, p in recipe.model.named_parameters())
    assert all(p.grad is None for p in recipe.model.parameters())
