"""Verbs and replay on a GPU: as on the CPU in double precision, and the same bits each time."""

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics import sites
from tests.zoo.small_models import tokens, trained, transformer, transformer_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CONTRASTS = [dy.Contrast(tokens(1), tokens(2), tokens(3)), dy.Contrast(tokens(4), tokens(5), tokens(6))]
SITES = {
    dy.patch_gradients: sites.matrices(transformer()),
    dy.patch_updates: sites.matrices(transformer()),
    dy.patch_signals: sites.activations(transformer(), "*hook_z", ("layer", "head"), tokens(1)),
    dy.attribute_step: sites.neurons(transformer()),
}

every_verb = pytest.mark.parametrize("verb", SITES, ids=lambda verb: verb.__name__)


@pytest.fixture(scope="module")
def state():
    return trained(transformer_recipe(), [tokens(seed) for seed in range(3)]).checkpoints[-1]


def called(verb, state, device, measure=dy.measures.correct_logit):
    recipe = transformer_recipe(model=transformer().to(device))
    contrasts = [contrast.to(device) for contrast in CONTRASTS]
    return verb(recipe, state.to(device), contrasts, SITES[verb], measure)


@every_verb
@pytest.mark.parametrize(
    "measure",
    [dy.measures.correct_logit, lambda m, b: dy.measures.correct_logit(m, b)],
    ids=["logits", "own"],
)
def test_a_verb_finds_on_a_gpu_what_it_finds_on_the_cpu(verb, measure, state):
    ours, theirs = (called(verb, state, device, measure) for device in ("cuda", "cpu"))
    for name in theirs.data_vars:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-10)


@every_verb
def test_a_verb_finds_the_same_where_a_gpu_holds_one_model_at_a_time(verb, state):
    whole = called(verb, state, "cuda")
    with dy.max_memory(1):
        single = called(verb, state, "cuda")
    for name in whole.data_vars:
        np.testing.assert_allclose(single[name], whole[name], rtol=0, atol=1e-10)


def test_replayed_steps_are_the_same_to_the_bit(state):
    recipe = transformer_recipe(model=transformer().cuda())
    once, again = (
        dy.steps.advance(recipe, state.to("cuda"), state.step + 3, lambda step: tokens(step).to("cuda"))
        for _ in range(2)
    )
    for name, parameter in once.parameters.items():
        assert torch.equal(parameter, again.parameters[name]), name
