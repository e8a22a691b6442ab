"""An update divided by source: its parts add up to the optimizer's own step, whatever the settings."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import dynamics as dy
from dynamics.recipe import RecipeError
from dynamics.steps import gradient
from dynamics.steps.replaying import resumed
from dynamics.steps.states import starting_point
from dynamics.steps.updates_by_source import UpdatesBySource
from tests.zoo.cases import first_quick
from tests.zoo.small_models import CLIPS, LOOPED, OPTIMIZERS, classifier, classifier_recipe, points, trained

LINEAR = {name: made for name, made in OPTIMIZERS.items() if "amsgrad" not in name}
ROWS = {"a": slice(0, 2), "b": slice(2, 3), "c": slice(3, 7)}


def steps_and_parts(recipe, state, n_steps=6, rows=ROWS):
    """(Δ of the optimizer, {name: parts by source and their total}) of each of some steps."""
    found = []
    with resumed(recipe, state) as loop:
        parts = UpdatesBySource(
            loop.optimizer, {id(p): n for n, p in loop.model.named_parameters()}, recipe.clip
        )
        for i in range(n_steps):
            x, y = points(20 + i, dtype=next(loop.model.parameters()).dtype)
            before = {n: p.detach().clone() for n, p in loop.model.named_parameters()}

            def divide(x=x, y=y, before=before):
                parts.begin()
                for label, some in rows.items():
                    share = gradient(recipe, replace(state, parameters=before), (x[some], y[some])).gradients
                    n = len(y[some])
                    parts.add(
                        label,
                        {k: g if g is None else g * n / len(y) for k, g in share.items()},
                        loop.clipped_to,
                    )
                missed, lengths = parts.missed()
                assert missed <= 20 * torch.finfo(x.dtype).eps * lengths

            def look(before=before):
                moved = {n: p.detach() - before[n] for n, p in loop.model.named_parameters()}
                kept = ((n, u, u.directions.clone()) for n, u in parts.divided(before))
                found.append((moved, {n: (u.total, replace(u, directions=d)) for n, u, d in kept}))

            loop.take((x, y), divide, look)
    return found, parts.labels


def apart(moved, total) -> float:
    """‖parts' total − Δ‖ and ‖Δ‖."""
    gap = sum(float((total[n] - d).square().sum()) for n, d in moved.items())
    return gap**0.5, sum(float(d.square().sum()) for d in moved.values()) ** 0.5


@pytest.mark.parametrize("clipping", first_quick(["by norm", "unclipped"]))
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "warm"])
@pytest.mark.parametrize("optimizer", LINEAR)
def test_the_parts_add_up_to_the_optimizers_own_step(optimizer, fresh, clipping):
    warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: (step + 1) / 8)
    for dtype in (torch.float64, torch.float32):
        recipe = classifier_recipe(
            model=classifier(dtype=dtype),
            optimizer=LINEAR[optimizer],
            scheduler=warm_up,
            clip=CLIPS[clipping],
        )
        batches = [points(seed, dtype=dtype) for seed in range(0 if fresh else 4)]
        state = trained(recipe, batches).last if batches else starting_point(recipe, None)
        found, labels = steps_and_parts(recipe, state)
        assert [label for label in labels if label not in ("before", "decay")] == ["a", "b", "c"]
        for moved, parts in found:
            gap, size = apart(moved, {n: total for n, (total, _) in parts.items()})
            assert size > 0
            eps = torch.finfo(dtype).eps  # what θ' and θ were rounded to is no mistake of the parts
            lost = eps * sum(p.numel() for p in recipe.model.parameters()) ** 0.5
            assert gap <= (1e-12 if dtype == torch.float64 else 1e-6) * size + lost


def test_momentum_from_before_is_its_own_source_and_fades():
    recipe = classifier_recipe(optimizer=OPTIMIZERS["SGD momentum"])
    state = trained(recipe, [points(seed) for seed in range(4)]).last
    found, labels = steps_and_parts(recipe, state, n_steps=3)
    name = "encoder.weight"
    recorded = state.optimizer.state[name]["momentum_buffer"]
    for age, (_, parts) in enumerate(found, start=1):
        update = parts[name][1]
        torch.testing.assert_close(
            update.directions[labels.index("before")] * update.factor,
            -0.1 * 0.9**age * recorded,
            rtol=1e-12,
            atol=0,
        )


def test_decay_is_its_own_source():
    recipe = classifier_recipe(optimizer=partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    state = starting_point(recipe, None)
    ((_, parts),), labels = steps_and_parts(recipe, state, n_steps=1)
    for name, (_, update) in parts.items():
        torch.testing.assert_close(update.decay, -0.05 * state.parameters[name], rtol=1e-12, atol=0)
        assert labels == ["a", "b", "c"]  # no momentum from before, and the decay has none


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"optimizer": OPTIMIZERS["Adam amsgrad"]}, "amsgrad=True"),
        ({"optimizer": LOOPED["RMSprop"]}, "RMSprop is not AdamW, Adam or SGD"),
        ({"clip": CLIPS["by value"]}, "clipping by value"),
    ],
)
def test_what_is_not_linear_is_refused_in_words(changes, why):
    recipe = classifier_recipe(**changes)
    with pytest.raises(RecipeError, match=why):
        steps_and_parts(recipe, starting_point(recipe, None), n_steps=1)


def test_a_parameter_without_a_gradient_is_not_divided():
    model = classifier()
    recipe = classifier_recipe(model=model, loss=lambda m, batch: m.encoder(batch[0]).square().mean())
    found, _ = steps_and_parts(recipe, dy.steps.states.starting_point(recipe, None), n_steps=1)
    assert set(found[0][1]) == {"encoder.weight", "encoder.bias"}


@pytest.mark.parametrize("optimizer", LINEAR)
def test_sources_that_are_not_all_of_the_batch_miss_its_gradient(optimizer):
    recipe = classifier_recipe(optimizer=LINEAR[optimizer])
    with resumed(recipe, starting_point(recipe, None)) as loop:
        names = {id(p): n for n, p in loop.model.named_parameters()}
        parts = UpdatesBySource(loop.optimizer, names, recipe.clip)
        found = []

        def divide():
            parts.begin()
            parts.add("most", {n: 0.75 * p.grad for n, p in loop.model.named_parameters()}, 1.0)
            found.extend(parts.missed())

        loop.take(points(2), divide)
    missed, lengths = found
    assert missed > 0.2 * lengths
