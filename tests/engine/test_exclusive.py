"""Two verbs in two threads on one recipe give what they give alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import nn

import dynamics as dy
from dynamics import attribution, measures, patching
from dynamics.engine.exclusive import exclusive
from tests.zoo.small_models import tokens, transformer

LOOKS_AT_RESULTS = {"circuit"}


def loss(model: nn.Module, batch: dy.Batch) -> torch.Tensor:
    at = model(batch.tokens)[torch.arange(len(batch.tokens)), batch.target_pos]
    return F.cross_entropy(F.dropout(at, 0.1), batch.targets)


def test_every_verb_that_runs_a_model_is_exclusive():
    verbs = {n: f for room in (patching, attribution) for n, f in vars(room).items() if callable(f)}
    assert {name for name, verb in verbs.items() if not hasattr(verb, "__wrapped__")} == LOOKS_AT_RESULTS


@pytest.mark.slow
def test_verbs_in_many_threads_on_one_recipe_give_what_they_give_alone():
    model = transformer()
    recipe = dy.Recipe(model, loss, partial(torch.optim.AdamW, lr=0.01))
    contrasts = [dy.Contrast(tokens(n), tokens(n + 10), probe=tokens(n + 20)) for n in range(2)]
    sites = dy.sites.heads(model)
    verbs = [patching.patch_gradients, patching.patch_updates, attribution.attribute_step] * 3

    def found(verb: object) -> xr.Dataset:
        return verb(recipe, None, contrasts, sites, measures.correct_logit)

    before = torch.get_rng_state()
    alone = [found(verb) for verb in verbs]
    with ThreadPoolExecutor(len(verbs)) as pool:
        together = list(pool.map(found, verbs))
    for one, other in zip(alone, together, strict=True):
        xr.testing.assert_identical(one.drop_attrs(), other.drop_attrs())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_exclusive_function_may_call_another_and_lets_go_where_it_fails():
    @exclusive
    def inner(x: int) -> int:
        return 1 // x

    @exclusive
    def outer(x: int) -> int:
        return inner(x) + 1

    assert outer(1) == 2
    with pytest.raises(ZeroDivisionError):
        outer(0)
    other = threading.Thread(target=outer, args=(1,))
    other.start()
    other.join(timeout=5)
    assert not other.is_alive()


def test_a_verb_that_ctrl_c_ends_in_the_middle_of_an_exchange_leaves_the_model_as_it_was():
    recipe = dy.Recipe(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), loss, partial(torch.optim.SGD, lr=0.1))
    weight, random = recipe.model[0].weight, torch.get_rng_state()

    @exclusive
    def interrupted(recipe: dy.Recipe) -> None:
        recipe.model[0]._parameters["weight"] = nn.Parameter(torch.zeros(2, 2))
        recipe.model[0].register_forward_hook(print)
        recipe.model[1].training = False
        torch.rand(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(recipe)
    assert recipe.model[0].weight is weight
    assert not recipe.model[0]._forward_hooks
    assert recipe.model[1].training
    assert torch.equal(torch.get_rng_state(), random)
