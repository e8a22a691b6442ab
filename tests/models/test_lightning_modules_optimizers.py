"""What a LightningModule configures: whose parameters its optimizer holds, when its scheduler moves."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.recipe import ByNorm, RecipeError
from tests.zoo.lightning_modules import (
    BATCHES,
    PAIR,
    ByModuleType,
    Plain,
    Rich,
    assert_replays,
    recorded,
    with_optimizers,
)
from tests.zoo.small_models import margin


def test_the_optimizer_holds_the_very_parameters_it_is_given_and_does_not_touch_them():
    recipe = dy.Recipe.from_lightning(ByModuleType())
    given = [nn.Parameter(p.detach() + 1, requires_grad=p.requires_grad) for p in recipe.model.parameters()]
    before = [p.detach().clone() for p in given]
    optimizer = recipe.build_optimizer(given)
    names = dict(zip(map(id, given), dict(recipe.model.named_parameters()), strict=True))
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == [
        ["head.bias", "scale.weight", "scale.bias"],
        ["body.weight", "head.weight"],
    ]
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(given, before, strict=True))
    assert [p.requires_grad for p in given] == [p.requires_grad for p in recipe.model.parameters()]


def test_parameters_of_another_model_are_refused():
    recipe = dy.Recipe.from_lightning(Plain())
    parameters = list(recipe.model.parameters())
    for given in (parameters[:-1], parameters[::-1], []):
        with pytest.raises(RecipeError, match="not its 4 in their order"):
            recipe.build_optimizer(given)


def test_each_optimizer_has_a_scheduler_of_its_own_and_both_are_let_go():
    recipe = dy.Recipe.from_lightning(Rich())
    one, other = (recipe.build_optimizer(recipe.model.parameters()) for _ in range(2))
    assert recipe.build_scheduler(one).optimizer is one
    assert recipe.build_scheduler(other).optimizer is other
    assert [group["lr"] for group in one.param_groups] == [0.02 / 5, 0.01 / 5]
    watched = weakref.ref(one)
    del one
    gc.collect()
    assert watched() is None


def test_another_optimizer_needs_another_scheduler_too():
    recipe = dy.Recipe.from_lightning(Rich())
    other = dataclasses.replace(recipe, optimizer=lambda parameters: SGD(parameters, lr=1.0))
    with pytest.raises(RecipeError, match="Replace both"):
        dy.patch_gradients(other, None, [PAIR], sites.parameters(other.model), margin)
    constant = dataclasses.replace(other, scheduler=None)
    assert dy.patch_gradients(constant, None, [PAIR], sites.parameters(other.model), margin)["effect"].any()


def test_a_recipe_can_be_replaced_and_copied():
    recipe = dy.Recipe.from_lightning(Plain())
    clipped = dataclasses.replace(recipe, clip=ByNorm(0.1))
    assert clipped.clip == ByNorm(0.1)
    assert clipped.model is recipe.model
    start = Checkpoint.capture(recipe.model)
    one, two = (dy.steps.replay(r, start, BATCHES[0]) for r in (recipe, copy.deepcopy(recipe)))
    assert one.equals(two)
    assert not one.equals(dy.steps.replay(clipped, start, BATCHES[0]))


HELD = {
    "every epoch": lambda o: ([o], [StepLR(o, 1, 0.1)]),
    "every epoch, unsaid": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": StepLR(o, 1, 0.1)}},
    "every epoch, said": lambda o: (
        [o],
        [{"scheduler": StepLR(o, 1, 0.1), "interval": "epoch", "frequency": 1}],
    ),
    "every second step": lambda o: (
        [o],
        [{"scheduler": StepLR(o, 1, 0.1), "interval": "step", "frequency": 2}],
    ),
    "on a plateau": lambda o: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": ReduceLROnPlateau(o), "interval": "step", "monitor": "loss"},
    },
}


def test_a_scheduler_of_epochs_leaves_every_single_step_exact_and_its_rate_for_the_checkpoint_to_tell(
    tmp_path,
):
    module = with_optimizers(HELD["every epoch"])
    run = recorded(tmp_path / "run", module, epochs=2)
    recipe = dy.Recipe.from_lightning(module)
    assert [run.at(step).optimizer.groups[0]["lr"] for step in (0, 3, 4, 7)] == pytest.approx(
        [0.01, 0.01, 0.001, 0.001]
    )
    assert_replays(recipe, run, [0, 1, 2, 4, 5, 6])
    for step in (3, 7):
        replayed = dy.steps.replay(recipe, run.at(step), BATCHES[3])
        assert all(
            name.startswith(("optimizer/groups/0/lr", "scheduler/"))
            for name in replayed.differences(run.at(step + 1))
        )
        assert replayed.optimizer.groups[0]["lr"] == run.at(step).optimizer.groups[0]["lr"]


@pytest.mark.parametrize("held", HELD)
def test_a_scheduler_that_does_not_move_after_every_step_is_never_moved_on_in_silence(held):
    recipe = dy.Recipe.from_lightning(with_optimizers(HELD[held]))
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    start = Checkpoint.capture(recipe.model, optimizer, recipe.build_scheduler(optimizer))
    assert dy.steps.replay(recipe, start, BATCHES[0]).optimizer.groups[0]["lr"] == 0.01
    with pytest.raises(RecipeError, match=r"does not move after every step .* scheduler=None"):
        dy.steps.advance(recipe, start, 2, lambda step: BATCHES[step])
    constant = dataclasses.replace(recipe, scheduler=None)
    assert dy.steps.advance(constant, start, 3, lambda s: BATCHES[s]).optimizer.groups[0]["lr"] == 0.01


def test_a_scheduler_that_the_module_moves_in_its_own_way_is_held():
    class Moves(Plain):
        def configure_optimizers(self):
            optimizer = SGD(self.parameters(), lr=0.1)
            return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.1), "interval": "step"}]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step()

    recipe = dy.Recipe.from_lightning(Moves())
    start = Checkpoint.capture(recipe.model)
    with pytest.raises(RecipeError, match="replays single steps"):
        dy.steps.advance(recipe, start, 2, lambda step: BATCHES[step])
