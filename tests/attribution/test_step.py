"""attribute_step beside a slow way of finding the same: copies, one site at a time, many small steps of a line."""

import copy
from types import EllipsisType

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.sites import Site
from tests.oracles.seed_patching import backward
from tests.zoo.small_models import (
    CLIPS,
    LOOPED,
    OPTIMIZERS,
    classifier_recipe,
    clip,
    draws,
    margin,
    points,
    spread,
    trained,
)

BATCHES = [points(seed) for seed in range(3)]
PAIR = dy.Contrast(points(10), points(11), points(12))


def after_a_step(recipe, live, batch, fresh):
    """A copy of the live model after torch's own clipping and optimizer step on a batch."""
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    if fresh:
        optimizer = recipe.optimizer(list(model.parameters()))
    for name, g in backward(recipe, model, batch).items():
        model.get_parameter(name).grad = g
    clip(recipe, model)
    optimizer.step()
    return model.eval()


def slowly(base, source, site, measure, probe, places):
    """Trapezoid sum of ⟨∇M, Δ⟩ over what one site covers, at the given places between two models."""
    values = []
    for place in places:
        model = copy.deepcopy(base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += place * (source.get_parameter(name) - parameter)
        inputs = [model.get_parameter(name) for name in site.covers]
        found = torch.autograd.grad(measure(model, probe).mean(), inputs, allow_unused=True)
        value = 0.0
        for (name, index), g in zip(site.covers.items(), found, strict=True):
            delta = (source.get_parameter(name) - base.get_parameter(name)).detach()
            if g is not None:
                value += float(
                    (g * delta).sum() if isinstance(index, EllipsisType) else (g * delta)[index].sum()
                )
        values.append(value)
    return values[0] if len(places) == 1 else np.trapezoid(values, places)


PIECES = [
    Site("all", {"encoder.weight": ..., "encoder.bias": (), "temperature": ...}),
    Site("a unit", {"encoder.weight": (3,), "encoder.bias": (-1,), "head.weight": (slice(None), 3)}),
    Site("every other", {"encoder.weight": (torch.tensor([0, 3, -1]), slice(1, 5, 2))}),
    Site("a mask", {"head.weight": torch.rand(3, 8, generator=draws(0)) < 0.4}),
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD nesterov", "RMSprop"])
@pytest.mark.parametrize("clipping", CLIPS)
@pytest.mark.parametrize("start", ["fresh", "stored"])
def test_each_site_has_what_the_slow_way_finds(optimizer, clipping, start):
    recipe = classifier_recipe(optimizer={**OPTIMIZERS, **LOOPED}[optimizer], clip=CLIPS[clipping])
    live = trained(recipe, BATCHES)
    checkpoint = live.last.with_fresh_optimizer() if start == "fresh" else live.last
    base, source = (after_a_step(recipe, live, b, start == "fresh") for b in (PAIR.base, PAIR.source))
    measures = {"margin": margin, "spread": spread}
    first = dy.attribute_step(recipe, checkpoint, [PAIR], PIECES, measures, "first_order")
    whole = dy.attribute_step(recipe, checkpoint, [PAIR], PIECES, measures)
    for name, measure in measures.items():
        scale = max(abs(whole["attribution"].sel(measure=name)).max().item(), 1e-3)
        for site in PIECES:
            at = {"measure": name, "site": site.label}
            expected = slowly(base, source, site, measure, PAIR.probe, [0.0])
            assert first["attribution"].sel(at).item() == pytest.approx(expected, abs=1e-10 * scale)
            expected = slowly(base, source, site, measure, PAIR.probe, np.linspace(0, 1, 11))
            assert whole["attribution"].sel(at).item() == pytest.approx(expected, abs=3e-3 * scale)


@pytest.mark.slow
def test_with_many_more_places_the_slow_way_comes_as_close_as_they_allow():
    recipe = classifier_recipe()
    live = trained(recipe, BATCHES)
    base, source = (after_a_step(recipe, live, b, False) for b in (PAIR.base, PAIR.source))
    found = dy.attribute_step(recipe, live.last, [PAIR], PIECES, margin)["attribution"].isel(example=0)
    for site, value in zip(PIECES, found.values, strict=True):
        errors = [
            abs(slowly(base, source, site, margin, PAIR.probe, np.linspace(0, 1, n + 1)) - value)
            for n in (50, 200)
        ]
        assert errors[1] < 1e-7
        assert errors[0] > 10 * errors[1]  # a trapezoid's error falls as the square of its steps
