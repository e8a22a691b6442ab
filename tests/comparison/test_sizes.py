"""Sizes of a step against torch's own clipping and optimizers, and quantities along a run."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam, AdamW

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics import sites, tasks
from dynamics.comparison import compare_updates, compare_weights, over_training, score, step_sizes
from dynamics.measures import cross_entropy
from dynamics.recipe import ByNorm
from tests.zoo.comparison_models import living, questions

EXACT = {"rtol": 1e-11, "atol": 1e-14}


def warmed(recipe, optimizer, n=3):
    """A model after a few steps, its optimizer and the checkpoint of both."""
    model = living(recipe, Checkpoint.capture(recipe.model))
    living_optimizer = optimizer(model.parameters())
    for i in range(n):
        living_optimizer.zero_grad()
        cross_entropy(model, questions(60 + i)).backward()
        living_optimizer.step()
    return model, living_optimizer, Checkpoint.capture(model, living_optimizer, step=n)


def test_sites_that_the_model_does_not_have_or_that_share_a_label_are_refused(recipe):
    twice = [sites.Site("it", {"embed.W_E": ...})] * 2
    for chosen, says in (
        (twice, "occur more than once"),
        ([sites.Site("no", {"nothing": ...})], "covers 'nothing'"),
    ):
        with pytest.raises(sites.SiteError, match=says):
            step_sizes(recipe, None, questions(1), chosen)


@pytest.mark.parametrize(
    "optimizer", [partial(AdamW, lr=0.01), partial(Adam, lr=0.01, amsgrad=True), partial(SGD, lr=0.1)]
)
@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_a_step_has_the_sizes_that_torch_gives_it(recipe, optimizer, limit):
    recipe = replace(recipe, optimizer=optimizer, max_grad_norm=limit, clip=None)
    model, living_optimizer, state = warmed(recipe, optimizer)
    chosen, batch = sites.matrices(recipe.model), questions(70)
    found = step_sizes(recipe, state, batch, chosen)
    before = {n: p.detach().clone().numpy() for n, p in model.named_parameters()}
    living_optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    gradients = {n: p.grad.clone().numpy() for n, p in model.named_parameters()}
    total = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    name = "unembed.W_U"
    clip = float(dict(model.named_parameters())[name].grad.norm()) / np.linalg.norm(gradients[name])
    living_optimizer.step()
    after = {n: p.detach().numpy() for n, p in model.named_parameters()}
    np.testing.assert_allclose(found["total_norm"], total, **EXACT)
    np.testing.assert_allclose(found["clip"], clip, **EXACT)
    assert (clip < 0.999) == (limit == 0.05)
    for i, site in enumerate(chosen):

        def norm(tensors, site=site):
            return np.sqrt(sum((tensors[n][index] ** 2).sum() for n, index in site.covers.items()))

        moved = norm({n: after[n] - before[n] for n in before})
        np.testing.assert_allclose(found["gradient_norm"][i], norm(gradients), **EXACT)
        np.testing.assert_allclose(found["share"][i], norm(gradients) ** 2 / total**2, **EXACT)
        np.testing.assert_allclose(found["update_norm"][i], moved, rtol=1e-9, atol=1e-14)
        if norm(before):
            np.testing.assert_allclose(found["relative_update"][i], moved / norm(before), rtol=1e-9)
    np.testing.assert_allclose(found["share"].sum(), 1, rtol=1e-12)


def test_adams_effective_step_is_what_a_unit_of_momentum_moves(recipe):
    """With m̂ = 1 everywhere, no decay and a gradient that leaves the moments as they are, Δθ is −η / (√v̂ + ε)."""
    betas, eps, rate = (0.9, 0.99), 1e-6, 0.02
    adam = partial(Adam, lr=rate, betas=betas, eps=eps)
    recipe = replace(recipe, optimizer=adam, clip=None)
    _, _, state = warmed(recipe, adam)
    chosen = sites.heads(recipe.model)
    found = step_sizes(recipe, state, questions(70), chosen)
    for i, site in enumerate(chosen):
        logs = []
        for name, index in site.covers.items():
            kept = state.optimizer.state[name]
            v = kept["exp_avg_sq"][index].numpy().ravel() / (1 - betas[1] ** 3)
            logs += [np.log(rate / (np.sqrt(x) + eps)) for x in v]
        np.testing.assert_allclose(found["effective_step"][i], np.exp(np.mean(logs)), **EXACT)


def test_without_second_moments_there_is_no_effective_step(recipe):
    _, _, state = warmed(recipe, recipe.optimizer)
    chosen = sites.components(recipe.model)
    assert np.isnan(
        step_sizes(recipe, state.with_fresh_optimizer(), questions(70), chosen)["effective_step"]
    ).all()
    assert not np.isnan(step_sizes(recipe, state, questions(70), chosen)["effective_step"]).any()
    plain = replace(recipe, optimizer=partial(SGD, lr=0.1))
    assert np.isnan(step_sizes(plain, None, questions(70), chosen)["effective_step"]).all()


def test_what_the_optimizer_does_not_hold_is_no_part_of_the_norm(recipe):
    def only_heads(parameters):
        return SGD([p for p in parameters if p.ndim == 3], lr=0.1)

    recipe = replace(recipe, optimizer=only_heads, clip=ByNorm(1.0, over="optimizer"))
    found = step_sizes(recipe, None, questions(70), sites.components(recipe.model))
    model = living(recipe, Checkpoint.capture(recipe.model))
    cross_entropy(model, questions(70)).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.ndim == 3])
    np.testing.assert_allclose(found["total_norm"], float(expected), **EXACT)
    assert float(found["update_norm"].sel(site="embed")) == 0


# --- along a run ------------------------------------------------------------------------------------------


@pytest.fixture
def task(run):
    return tasks.load(run.config)


@pytest.mark.slow
def test_a_curve_is_its_quantity_at_every_step_stored_or_reached(run, task):
    recipe = task.recipe()
    quantities = {1: lambda c: {"score": score(recipe, c, task.evaluation)}}
    found = over_training(quantities, run, [1, 2, 7, 12], recipe, task.batch)["score"]
    assert found["step"].values.tolist() == [1, 2, 7, 12]
    assert "previous" not in found.coords
    for step in (1, 2, 7, 12):
        alone = score(recipe, dy.steps.reach(recipe, run, step, task.batch), task.evaluation)
        np.testing.assert_array_equal(found["loss"].sel(step=step), alone["loss"])


@pytest.mark.slow
def test_neighbours_are_compared_pair_by_pair_and_updates_by_three(run, task):
    recipe = task.recipe()
    chosen = sites.layers(recipe.model)
    quantities = {
        2: lambda a, b: {"weights": compare_weights(a, b, recipe, chosen)},
        3: lambda a, b, c: {"updates": compare_updates(a, b, c, recipe, chosen)},
    }
    found = over_training(quantities, run, run.steps, recipe, task.batch)
    pairs, threes = found["weights"], found["updates"]
    assert pairs["step"].values.tolist() == list(run.steps[1:])
    assert pairs["previous"].values.tolist() == list(run.steps[:-1])
    alone = compare_weights(run.at(4), run.at(6), recipe, chosen)
    np.testing.assert_array_equal(pairs["distance"].sel(step=6), alone["distance"])
    assert threes["previous"].values.tolist() == list(run.steps[:-2])
    expected = compare_updates(run.at(8), run.at(10), run.at(12), recipe, chosen)
    np.testing.assert_array_equal(threes["cosine"].sel(step=12), expected["cosine"])


def test_all_against_one_is_a_curve_of_distances(run, task):
    recipe = task.recipe()
    chosen, first = sites.layers(recipe.model), run.at(0)
    quantities = {1: lambda c: {"weights": compare_weights(first, c, recipe, chosen)}}
    found = over_training(quantities, run, run.steps, recipe, task.batch)["weights"]
    assert float(found["distance"].sel(step=0).max()) == 0
    last = compare_weights(first, run.last, recipe, chosen)
    np.testing.assert_array_equal(found["distance"].sel(step=12), last["distance"])


def test_an_answer_that_is_not_always_there_has_the_steps_where_it_is(run, task):
    recipe = task.recipe()

    def sometimes(*states):
        return {} if states[-1].step == 6 else {"score": score(recipe, states[-1], task.evaluation)}

    found = over_training({2: sometimes}, run, run.steps, recipe, task.batch)["score"]
    assert found["step"].values.tolist() == [2, 4, 8, 10, 12]
    assert found["previous"].values.tolist() == [0, 2, 6, 8, 10]


@pytest.mark.slow
def test_checkpoints_are_read_once_and_only_the_neighbours_are_held(run, task, monkeypatch):
    recipe = task.recipe()
    seen, read = [], []
    at = Trajectory.at
    monkeypatch.setattr(Trajectory, "at", lambda self, step: read.append(step) or at(self, step))

    def held():
        return len({id(ref()) for ref in seen if ref() is not None})

    def quantity(*states):
        seen.append(weakref.ref(states[-1]))
        if held() > 2:
            gc.collect()
        assert held() <= 2
        return {str(len(states)): compare_weights(states[0], states[-1], recipe, sites.layers(recipe.model))}

    over_training({1: quantity, 2: quantity}, run, run.steps, recipe, task.batch)
    assert read == list(run.steps)
    assert len(seen) == 2 * len(run.steps) - 1


@pytest.mark.parametrize(("steps", "n"), [([], 1), ([2], 2), ([4, 2], 1), ([2, 2], 1), ([2, 4], 0)])
def test_steps_that_do_not_rise_or_are_too_few_are_refused(run, task, steps, n):
    with pytest.raises(ValueError, match="expected rising steps"):
        over_training({n: lambda *c: {}}, run, steps, task.recipe(), task.batch)


def test_two_quantities_of_one_name_are_refused(run, task):
    def score_of(*states):
        return {"score": score(task.recipe(), states[-1], task.evaluation)}

    with pytest.raises(ValueError, match="1 and of 2 checkpoints both give 'score'"):
        over_training({1: score_of, 2: score_of}, run, run.steps, task.recipe(), task.batch)
