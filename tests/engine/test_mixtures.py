"""Where clipping couples nothing, a step with a patched gradient is a selection from two finished steps."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.engine import gradient_prefetch
from dynamics.patching import gradients as patch_gradients_module
from dynamics.recipe import ByNorm, ByValue
from dynamics.steps import gradient
from dynamics.steps.states import starting_point
from dynamics.steps.update import Steps, step_from
from dynamics.trees import exchanged, squared_norm
from tests.engine.test_runs_unused import Routed
from tests.zoo.any_models import routed_loss, routed_words
from tests.zoo.small_models import OPTIMIZERS, tokens, trained, transformer_recipe

BASE, SOURCE = tokens(2), tokens(3)
CONTRAST = dy.Contrast(BASE, SOURCE, tokens(4))


@pytest.fixture(scope="module")
def setting():
    recipe = transformer_recipe(max_grad_norm=None)
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last
    base, source = (gradient(recipe, checkpoint, batch).gradients for batch in (BASE, SOURCE))
    return recipe, checkpoint, base, source


def both_norms(setting):
    return sum(squared_norm(g) for gradients in setting[2:] for g in gradients.values())


ELEMENTWISE = ["AdamW", "Adam", "SGD momentum"]


@pytest.mark.parametrize("clip", [None, ByValue(1e-3), ByNorm(1e3)])
@pytest.mark.parametrize("optimizer", ELEMENTWISE)
def test_an_uncoupled_step_is_taken_element_by_element_from_two(clip, optimizer, setting):
    """The slow step with the mixed gradient has the elements of the two slow steps, which is the fast way."""
    recipe = replace(setting[0], optimizer=OPTIMIZERS[optimizer], clip=clip)
    checkpoint, base, source = starting_point(recipe, None), *setting[2:]
    assert Steps(recipe, checkpoint).separable(base, source)
    ends = [step_from(recipe, checkpoint, gradients) for gradients in (base, source)]
    for site in sites.heads(recipe.model):
        slow = step_from(recipe, checkpoint, exchanged(base, source, site.covers))
        for name, expected in exchanged(*ends, site.covers).items():
            assert torch.equal(slow[name], expected), (site.label, name)


def test_a_norm_that_a_mixture_may_reach_couples(setting):
    recipe, checkpoint, base, source = setting
    longest = both_norms(setting) ** 0.5 + 1e-6
    for limit, expected in ((longest * (1 + 1e-9), True), (longest * (1 - 1e-9), False)):
        steps = Steps(replace(recipe, clip=ByNorm(limit)), checkpoint)
        assert steps.separable(base, source) is expected


def test_norms_of_parameters_that_are_not_the_optimizers_do_not_count(setting):
    recipe, checkpoint, base, source = setting
    most = {name: g * 1e3 if name == "unembed.W_U" else g for name, g in base.items()}
    clip = ByNorm(2 * both_norms(setting) ** 0.5, over="optimizer")

    def without(parameters):
        *kept, _ = parameters
        return torch.optim.AdamW(kept, lr=1e-2)

    last = list(base)[-1]
    assert not Steps(replace(recipe, clip=clip), checkpoint).separable(most, source)
    most = {name: g * 1e3 if name == last else g for name, g in base.items()}
    other = replace(recipe, clip=clip, optimizer=without)
    assert Steps(other, starting_point(other, None)).separable(most, source)


def test_where_one_batch_leaves_out_a_parameter_steps_are_taken_one_by_one():
    """Of half a parameter exchanged, the other half coasts: no element of either step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Routed().double()
    recipe = dy.Recipe(model, routed_loss, partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1))
    checkpoint = trained(recipe, [routed_words(0), routed_words(1)]).last
    left, right = (gradient(recipe, checkpoint, routed_words(seed)).gradients for seed in (2, 3))
    assert not Steps(recipe, checkpoint).separable(left, right)
    assert Steps(recipe, checkpoint).separable(left, left)


def test_an_optimizer_that_looks_across_elements_couples(setting):
    class Layerwise(torch.optim.SGD):
        pass

    recipe, checkpoint, base, source = setting
    other = replace(recipe, optimizer=partial(Layerwise, lr=1e-2))
    assert not Steps(other, starting_point(other, None)).separable(base, source)
    sparse = {name: g.to_sparse() if name == "embed.W_E" else g for name, g in base.items()}
    assert not Steps(recipe, checkpoint).separable(sparse, source)
    assert not Steps(recipe, checkpoint).separable(base, sparse)


@pytest.mark.parametrize("clip", [None, ByNorm(1e3), ByValue(1e-3)])
def test_the_verb_finds_the_same_as_by_a_step_for_every_site(clip, setting, monkeypatch):
    recipe = replace(setting[0], clip=clip)
    chosen = [*sites.heads(recipe.model), *sites.parameters(recipe.model)]
    taken = []
    begin = Steps.begin
    monkeypatch.setattr(
        Steps, "begin", lambda self, many, space=None: taken.append(len(many)) or begin(self, many, space)
    )
    found = dy.patch_gradients(recipe, setting[1], [CONTRAST], chosen, dy.measures.correct_logit)
    assert sum(taken) == 4  # the references alone
    monkeypatch.setattr(Steps, "separable", lambda *given: False)
    slow = dy.patch_gradients(recipe, setting[1], [CONTRAST], chosen, dy.measures.correct_logit)
    n_bases = 3  # one in each stack
    assert sum(taken) == 4 + 4 + len(chosen) + n_bases
    for name in slow.data_vars:
        np.testing.assert_allclose(found[name], slow[name], rtol=0, atol=1e-12)
    assert float(abs(slow["effect"]).max()) > 1e-4


def test_sites_with_positions_take_steps(setting, monkeypatch):
    recipe = setting[0]
    located = sites.at_positions([sites.heads(recipe.model)[0]], {"first": 0})
    assert located[0].positions is not None
    monkeypatch.setattr(patch_gradients_module, "mixed_models", None)
    dy.patch_gradients(recipe, setting[1], [CONTRAST], located, dy.measures.correct_logit)


def test_each_gradient_is_taken_once(setting, monkeypatch):
    calls = []
    take = gradient_prefetch.gradient
    monkeypatch.setattr(gradient_prefetch, "gradient", lambda *given: calls.append(1) or take(*given))
    chosen = sites.parameters(setting[0].model)
    with dy.max_memory(1):
        dy.patch_gradients(setting[0], setting[1], [CONTRAST], chosen, dy.measures.correct_logit)
    assert len(calls) == 2
