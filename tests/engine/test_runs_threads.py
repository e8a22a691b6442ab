"""Verbs with as many threads as the user has: the same bits for any number, and the setting left as it was."""

import threading

import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.steps import elementwise_optimizers
from tests.zoo.small_models import tokens, trained, transformer_recipe

RECIPE = transformer_recipe()
CONTRASTS = [dy.Contrast(tokens(1), tokens(2), tokens(3)), dy.Contrast(tokens(4), tokens(5), tokens(6))]
MATRICES = sites.matrices(RECIPE.model)
SITES = {
    dy.patch_gradients: MATRICES,
    dy.patch_updates: MATRICES,
    dy.patch_signals: sites.activations(RECIPE.model, "*hook_z", ("head",), tokens(1)),
    dy.attribute_step: MATRICES,
}


def answer(model, batch):
    """The right logit, by a function that is the user's own."""
    return dy.measures.correct_logit(model, batch)


every_verb = pytest.mark.parametrize("verb", SITES, ids=lambda verb: verb.__name__)


@pytest.fixture(scope="module")
def state():
    return trained(RECIPE, [tokens(seed) for seed in range(3)]).checkpoints[-1]


@pytest.fixture(autouse=True)
def same_setting_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def called(verb, state, threads, measure=dy.measures.correct_logit):
    torch.set_num_threads(threads)
    return verb(RECIPE, state, CONTRASTS, SITES[verb], measure)


@pytest.mark.slow
@every_verb
@pytest.mark.parametrize("measure", [dy.measures.correct_logit, answer], ids=["of logits", "a function"])
def test_results_are_the_same_to_the_bit_for_any_number_of_threads(verb, measure, state, monkeypatch):
    monkeypatch.setattr(elementwise_optimizers, "BLOCK", 8)  # several blocks a parameter
    alone = called(verb, state, 1, measure)
    for threads in (2, 3):
        assert called(verb, state, threads, measure).equals(alone)


@every_verb
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_and_ctrl_c_leave_the_setting_and_no_worker(verb, error, state):
    seen = []

    def measure(model, batch):
        seen.append(torch.get_num_threads())
        if len(seen) == 7:
            raise error("stop")
        return answer(model, batch)

    before = threading.active_count()
    with pytest.raises(error):
        called(verb, state, 3, measure)
    assert torch.get_num_threads() == 3
    assert set(seen) == {1}
    assert threading.active_count() == before
