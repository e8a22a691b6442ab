"""Windows of steps taken the slow way."""

import copy
from functools import partial
from types import EllipsisType

import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.recipe import ByNorm
from dynamics.sites import Site
from tests.zoo.small_models import (
    CLIPS,
    LOOPED,
    OPTIMIZERS,
    classifier,
    classifier_loss,
    classifier_recipe,
    clip,
    draws,
    gap,
    points,
    same,
    trained,
)

ALL = {**OPTIMIZERS, **LOOPED}
SOME = ("AdamW", "AdamW in two groups", "Adam amsgrad", "SGD momentum", "SGD", "RMSprop", "NAdam")
REFERENCES = ("untouched", "base", "source", "coasted")

warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: (step + 1) / 8)
some_optimizers_and_clips = pytest.mark.parametrize(
    ("optimizer", "clipping"),
    [
        *((name, "by norm") for name in SOME),
        *((n, c) for n in ("AdamW", "RMSprop") for c in CLIPS if c != "by norm"),
    ],
)
some_optimizers = pytest.mark.parametrize("optimizer", SOME)


def window(n=3, rows=7, source_rows=7):
    """A contrast of two sequences of batches, none of which they share."""
    return dy.Contrast(
        [points(10 + i, rows) for i in range(n)],
        [points(20 + i, source_rows) for i in range(n)],
        points(30),
        {"example": "first"},
    )


def normed(**changes):
    """A classifier with batch statistics and dropout after three steps of training with a scheduler."""
    model = changes.pop("model", None) or classifier(norm=True, dropout=0.3)
    recipe = classifier_recipe(model=model, **{"clip": CLIPS["by norm"], "scheduler": warm_up, **changes})
    return recipe, trained(recipe, [points(seed) for seed in range(3)], seed=4)


def pieces(model):
    """Whole parameters, a unit, a mask, statistics, what is covered by nothing and by everything."""
    scattered = torch.rand(8, 5, generator=draws(0)) < 0.4
    empty = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    return [
        Site("head", {"head.weight": ..., "head.bias": ...}),
        Site("temperature", {"temperature": ...}),
        Site("a unit", {"encoder.weight": (3,), "encoder.bias": (3,), "head.weight": (slice(None), 3)}),
        Site("a mask", {"encoder.weight": scattered}),
        Site("statistics", {"norm.running_mean": ..., "norm.running_var": (slice(0, 4),)}),
        Site("nothing", empty),
        sites.everything(model),
    ]


def along(recipe, checkpoint, contrast, patched, after):
    """All tensors of the model that each cell was measured on: label -> one dict for each step measured."""
    seen = []

    def record(model, _):
        tensors = (*model.named_parameters(), *model.named_buffers())
        seen.append({name: tensor.detach().clone() for name, tensor in tensors})
        return torch.tensor(float(len(seen) - 1))

    found = dy.patch_window(recipe, checkpoint, [contrast], patched, record, after)
    rows = {name: found[name].isel(example=0) for name in REFERENCES}
    rows |= {s.label: found["patched"].isel(example=0).sel(site=s.label) for s in patched}
    return {label: [seen[int(place)] for place in row.values] for label, row in rows.items()}


def twin(recipe, live):
    """Copies of the live model, optimizer and scheduler."""
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    if not recipe.scheduler:
        return model, optimizer, None
    scheduler = recipe.scheduler(optimizer)
    scheduler.load_state_dict(live.scheduler.state_dict())
    for ours, theirs in zip(optimizer.param_groups, live.optimizer.param_groups, strict=True):
        ours["lr"] = theirs["lr"]
    return model, optimizer, scheduler


def slow_window(recipe, live, contrast, site):
    """An ordinary training loop: both backward passes, .grad overwritten at the site, torch's clipping."""
    model, optimizer, scheduler = twin(recipe, live)
    states = []
    with live.last.random_state():
        for base, source in zip(contrast.base, contrast.source, strict=True):
            before = copy.deepcopy(dict(model.named_buffers()))
            generators = torch.get_rng_state()
            model.zero_grad()
            recipe.loss(model, source).backward()
            theirs = {name: p.grad for name, p in model.named_parameters()}
            moved = copy.deepcopy(dict(model.named_buffers()))
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            torch.set_rng_state(generators)
            model.zero_grad()
            recipe.loss(model, base).backward()
            for name, index in site.covers.items():
                if name in moved:
                    model.get_buffer(name)[index] = moved[name][index]
                elif isinstance(index, EllipsisType):
                    model.get_parameter(name).grad = theirs[name]
                else:
                    model.get_parameter(name).grad[index] = theirs[name][index]
            clip(recipe, model)
            optimizer.step()
            if scheduler:
                scheduler.step()
            states.append(copy.deepcopy(dict([*model.named_parameters(), *model.named_buffers()])))
    return states


def floats(state):
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def agree(recipe, one, other, n=1):
    """Bitwise, except where torch's clipping adds its norm up in another order; that noise grows by the step."""
    return gap(one, other) < 1e-12 * n if isinstance(recipe.clip, ByNorm) else same(one, other)


def counted(recipe):
    """The recipe with a loss that keeps the batches it was called with."""
    calls = []

    def loss(model, batch):
        calls.append(batch)
        return classifier_loss(model, batch)

    return dy.Recipe(recipe.model, loss, recipe.optimizer, recipe.scheduler, recipe.clip), calls
