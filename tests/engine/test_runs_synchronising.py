"""What verbs read back from a device: as much a stack of models, whatever the number of sites in it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.steps.states import starting_point
from dynamics.steps.update import Steps
from scripts.shared.synchronising_calls import counted
from tests.zoo.small_models import tokens, trained, transformer, transformer_recipe

RECIPE = transformer_recipe()
CONTRAST = dy.Contrast(tokens(1), tokens(2), tokens(3))
SITES = {
    dy.patch_gradients: sites.matrices(RECIPE.model),
    dy.patch_updates: sites.matrices(RECIPE.model),
    dy.patch_signals: sites.activations(RECIPE.model, "blocks.0.attn.hook_z", ("head", "pos"), tokens(1)),
    dy.attribute_step: sites.neurons(RECIPE.model),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Counting is of this thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def state():
    return trained(RECIPE, [tokens(seed) for seed in range(3)]).checkpoints[-1]


def answer(model, batch):
    """The right logit, by a function that is the user's own."""
    return dy.measures.correct_logit(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [dy.measures.correct_logit, answer], ids=["of logits", "a function"])
@pytest.mark.parametrize("verb", SITES, ids=lambda verb: verb.__name__)
def test_more_sites_in_one_stack_are_not_waited_for_more_often(verb, measure, state, monkeypatch):
    monkeypatch.setattr(Checkpoint, "random_state", lambda self: nullcontext())  # those lie on the host
    found = {}
    for n in (3, 7):
        with counted() as calls:
            verb(RECIPE, state, [CONTRAST], SITES[verb][:n], measure)
        found[n] = dict(calls)
    assert sum(found[3].values()) > 0
    assert found[7] == found[3]


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.equal(x, x + 1), "equal"),
        (lambda x: x[x > 0], "a boolean index"),
    ],
)
def test_what_a_gpu_would_be_waited_for_is_counted(read, name):
    with counted() as calls:
        torch.ones(3) + 1
        read(torch.ones(3))
    assert calls[name] == 1
    assert set(calls) <= {name, "nonzero"}


@pytest.mark.parametrize("clip", [None, dy.ByValue(0.1)])
def test_steps_read_nothing_from_their_device(clip):
    """Of tensors on the meta device nothing can be read."""
    model = transformer().to("meta")
    recipe = replace(RECIPE, model=model, max_grad_norm=None, clip=clip)
    gradients = [{n: torch.empty_like(p) for n, p in model.named_parameters()} for _ in range(3)]
    stack = Steps(recipe, starting_point(recipe, None)).take(gradients)
    assert {n: t.shape for n, t in stack.stacked.items()} == {
        n: (3, *p.shape) for n, p in model.named_parameters()
    }
    assert all(t.device.type == "meta" for t in stack.stacked.values())
