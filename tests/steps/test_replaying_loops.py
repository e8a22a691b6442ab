"""Training loops as people write them by hand: a recipe for each, which replays every step bit for bit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.recipe import ByNorm, RecipeError
from dynamics.steps.walking import walk
from tests.zoo.small_models import classifier, classifier_loss, points

SINGLE = torch.float32
N_STEPS = 50


def small(**changes: Any) -> nn.Module:
    """A classifier in single precision, where the last bit tells."""
    return classifier(dtype=SINGLE, **changes)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return points(step, dtype=SINGLE)


def decay_groups(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    """Decay for matrices alone, in an order of groups that is not the model's."""
    given = list(parameters)
    vectors, matrices = ([p for p in given if (p.ndim > 1) == several] for several in (False, True))
    return torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}],
        **{"lr": 0.01, **settings},
    )


def head_alone(parameters: Any) -> torch.optim.Optimizer:
    """What fine-tunes a part of a model without freezing the rest."""
    return torch.optim.AdamW(list(parameters)[-2:], lr=0.01)


def replayed_differences(
    recipe: dy.Recipe, states: Sequence[Checkpoint], batch_of: Callable[[int], Any] = batch
) -> dict[int, list[str]]:
    """By step, in what its replay differs from the next state; empty where all steps are the same bits."""
    found = {}
    for before, after in pairwise(states):
        replayed = dy.steps.replay(recipe, before, batch_of(before.step))
        if names := after.differences(replayed) + after.rng_differences(replayed):
            found[before.step] = names
    return found


# --- which gradients a clip counts ------------------------------------------------------------------------


def clipped_by_hand(make_optimizer: Any, over: str, n_steps: int) -> Iterator[Checkpoint]:
    """A bare loop that clips the model's parameters or its optimizer's."""
    model = small()
    optimizer = make_optimizer(model.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(n_steps):
        yield Checkpoint.capture(model, optimizer, step=step)
        model.zero_grad()
        classifier_loss(model, batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters() if over == "model" else held, 0.1)
        optimizer.step()
    yield Checkpoint.capture(model, optimizer, step=n_steps)


@pytest.mark.parametrize("over", ["model", "optimizer"])
@pytest.mark.parametrize("make_optimizer", [decay_groups, head_alone])
def test_a_clip_counts_what_the_loop_counts(make_optimizer, over):
    states = list(clipped_by_hand(make_optimizer, over, 100))
    other = {"model": "optimizer", "optimizer": "model"}[over]
    recipe = dy.Recipe(small(), classifier_loss, make_optimizer, clip=ByNorm(0.1, over))
    assert replayed_differences(recipe, states) == {}
    assert replayed_differences(replace(recipe, clip=ByNorm(0.1, other)), states)


@pytest.mark.parametrize("over", ["model", "optimizer"])
@pytest.mark.parametrize("make_optimizer", [decay_groups, head_alone])
def test_given_gradients_are_clipped_over_the_same_parameters_one_by_one_at_once_and_on_end(
    make_optimizer, over
):
    recipe = dy.Recipe(classifier(), classifier_loss, make_optimizer, clip=ByNorm(0.1, over))
    state = Checkpoint.capture(recipe.model, make_optimizer(recipe.model.parameters()))
    for step, moved in enumerate(
        walk(recipe, state, lambda at: dy.steps.gradient(recipe, at, points(at.step)), 5)
    ):
        expected = dy.steps.replay(recipe, state, points(step))
        gradient = dy.steps.gradient(recipe, state, points(step)).gradients
        alone = dy.steps.step_from(recipe, state, gradient)
        (at_once,) = dy.steps.steps_from(recipe, state, [gradient])
        for found in (moved.parameters, alone, at_once):
            for name, tensor in expected.parameters.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-13)
        state = expected


@pytest.mark.parametrize("over", ["model", "optimizer"])
def test_steps_mix_element_by_element_where_no_counted_norm_can_reach_the_limit(over):
    recipe = dy.Recipe(classifier(), classifier_loss, head_alone)
    state = Checkpoint.capture(recipe.model, head_alone(recipe.model.parameters()))
    one, other = (dy.steps.gradient(recipe, state, points(seed)).gradients for seed in (0, 1))
    held = ("head.weight", "head.bias")
    norms = {
        "model": sum(float(g.square().sum()) for gs in (one, other) for g in gs.values()) ** 0.5,
        "optimizer": sum(float(gs[n].square().sum()) for gs in (one, other) for n in held) ** 0.5,
    }
    assert norms["model"] > 1.01 * norms["optimizer"]
    for limit, fits in ((1.001 * norms[over], True), (0.999 * norms[over], False)):
        clipped = replace(recipe, clip=ByNorm(limit, over))
        assert dy.steps.update.Steps(clipped, state).separable(one, other) == fits


def test_a_clip_over_anything_else_is_refused():
    with pytest.raises(RecipeError, match=r"over='group'.*expected 'model' .* or 'optimizer'"):
        ByNorm(1.0, over="group")
