"""Small parameters side by side: what stands together, and that no step depends on it."""

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics.steps import flat_parameters
from dynamics.steps.update import Steps
from tests.zoo.small_models import CLIPS, OPTIMIZERS, classifier_recipe, draws, points, same, trained


def together(recipe, checkpoint):
    return [list(flat.parts) for flat in Steps(recipe, checkpoint)._rules]


class Blocks(nn.Module):
    """Small tensors around a larger one."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 4), nn.Linear(4, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.last(self.middle(self.first(x).tanh()).tanh())


def recipe_of(name="AdamW", **changes):
    torch.manual_seed(0)
    return classifier_recipe(model=Blocks().double(), optimizer=OPTIMIZERS[name], **changes)


def test_neighbours_stand_together_until_they_are_many(monkeypatch):
    recipe = recipe_of()
    checkpoint = trained(recipe, [points(0)]).last
    names = list(checkpoint.parameters)
    assert together(recipe, checkpoint) == [names]
    monkeypatch.setattr(flat_parameters, "SMALL", 80)
    assert together(recipe, checkpoint) == [names[:2], names[2:3], names[3:5], names[5:]]


def test_parameters_of_several_groups_dtypes_or_ages_stand_apart():
    def groups(parameters):
        first, *rest = parameters
        return torch.optim.AdamW([{"params": [first]}, {"params": rest, "lr": 1e-4}], lr=1e-3)

    recipe = classifier_recipe(model=recipe_of().model, optimizer=groups)
    names = [name for name, _ in recipe.model.named_parameters()]
    assert together(recipe, trained(recipe, [points(0)]).last) == [names[:1], names[1:]]
    model = recipe_of().model
    model.last.float()
    mixed = dy.Recipe(model, None, OPTIMIZERS["AdamW"])
    assert together(mixed, dy.steps.states.starting_point(mixed, None)) == [names[:4], names[4:]]


@pytest.mark.parametrize("small", [1, 80, 10**6])
@pytest.mark.parametrize("clipping", CLIPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_has_the_bits_of_the_optimizers_own_however_many_stand_together(
    name, clipping, small, monkeypatch
):
    """Some gradients are one object in all steps, some differ, some are missing."""
    recipe = recipe_of(name, clip=CLIPS[clipping])
    checkpoint = trained(recipe, [points(0), points(1)]).last
    generator = draws(0)

    def drawn():
        return {
            n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for n, p in checkpoint.parameters.items()
        }

    base, source = drawn(), drawn()
    many = [
        base,
        {**base, "first.weight": source["first.weight"]},
        {**base, "first.weight": source["first.weight"], "last.bias": source["last.bias"]},
        {**base, "middle.weight": None},
        dict.fromkeys(base),
        {**dict.fromkeys(base), "last.bias": source["last.bias"]},
        source,
    ]
    monkeypatch.setattr(flat_parameters, "SMALL", small)
    found = list(Steps(recipe, checkpoint).take(many))
    for gradients, after in zip(many, found, strict=True):
        expected = dy.steps.step_from(recipe, checkpoint, gradients)
        assert same(after, expected)
    assert same(found[4], checkpoint.parameters)


def test_what_no_step_tells_apart_is_shared():
    recipe = recipe_of(clip=None)
    checkpoint = trained(recipe, [points(0)]).last
    base = {n: torch.ones_like(p) for n, p in checkpoint.parameters.items()}
    stack = Steps(recipe, checkpoint).take([base, dict(base)])
    assert stack.stacked == {}
    assert same(stack[0], dy.steps.steps_from(recipe, checkpoint, [base])[0])
