"""Every training_step gives its loss, or is refused with what it asked for."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.recipe import RecipeError
from tests.zoo.lightning_modules import BATCHES, Nested, Plain, Rich, gradient, with_step

SIGNATURES = {
    "batch": lambda self, batch: Plain.training_step(self, batch, 0),
    "batch and index": lambda self, batch, batch_idx: Plain.training_step(self, batch, batch_idx + 0),
    "batch and another name": lambda self, samples, i: Plain.training_step(self, samples, i + 0),
    "with a data loader": lambda self, batch, batch_idx, dataloader_idx=0: Plain.training_step(
        self, batch, 0
    ),
    "with options": lambda self, batch, *, scale=1.0: Plain.training_step(self, batch, 0) * scale,
    "anything": lambda self, *args: Plain.training_step(self, *args),
    "a dict": lambda self, batch: {"loss": Plain.training_step(self, batch, 0), "more": None},
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_every_signature_and_return_of_training_step_gives_the_loss(signature):
    found = gradient(with_step(SIGNATURES[signature]))
    twin = Plain()
    loss = F.cross_entropy(twin(BATCHES[0][0]), BATCHES[0][1])
    loss.backward()
    assert torch.equal(found.loss, loss)
    assert all(torch.equal(found.gradients[name], p.grad) for name, p in twin.named_parameters())


@pytest.mark.parametrize(
    ("returned", "shown"),
    [(None, "None"), ({"logits": 1}, "{'logits': 1}"), ({"loss": None}, "loss"), (0.5, "0.5")],
)
def test_a_training_step_without_a_loss_is_refused_with_what_it_returned(returned, shown):
    with pytest.raises(RecipeError, match=rf"Stepping.training_step returned .*{shown}.*needs a tensor"):
        gradient(with_step(lambda self, batch: returned))


ASKS = {
    "trainer.max_epochs": lambda self: self.trainer.max_epochs,
    "max_epochs, in a list": lambda self: [m.trainer.max_epochs for m in [self]],
    "global_step": lambda self: self.global_step,
    "current_epoch": lambda self: self.current_epoch,
    "strategy": lambda self: self.optimizers(),
    "lr_scheduler_configs": lambda self: self.lr_schedulers(),
}


@pytest.mark.parametrize("asked", ASKS)
def test_a_step_that_asks_for_its_trainer_is_refused_with_what_it_asked_for(asked):
    def step(self, batch):
        ASKS[asked](self)
        return Plain.training_step(self, batch, 0)

    word = asked.split(".")[-1].split(",")[0]
    with pytest.raises(RecipeError, match=rf"Stepping.training_step asks its Trainer for {word}.*loss="):
        gradient(with_step(step))


def test_a_part_that_asks_for_the_trainer_is_refused_by_its_own_name():
    class Asking(Plain):
        def training_step(self, batch, batch_idx):
            return Plain.training_step(self, batch, self.trainer.global_step)

    module = Nested()
    module.inner = Asking()
    with pytest.raises(RecipeError, match=r"Asking.training_step asks its Trainer for global_step"):
        gradient(module)


def test_an_optimizer_that_asks_for_the_trainer_is_refused_when_it_is_needed_and_can_be_replaced():
    class Asking(Plain):
        def configure_optimizers(self):
            optimizer = SGD(self.parameters(), lr=0.1)
            return [optimizer], [OneCycleLR(optimizer, 0.1, self.trainer.estimated_stepping_batches)]

    recipe = dy.Recipe.from_lightning(Asking())
    start = Checkpoint.capture(recipe.model)
    assert dy.steps.gradient(recipe, start, BATCHES[0]).loss > 0
    with pytest.raises(
        RecipeError,
        match=r"Asking.configure_optimizers asks its Trainer for estimated_stepping_batches.*optimizer=",
    ):
        dy.steps.replay(recipe, start, BATCHES[0])
    own = dataclasses.replace(recipe, optimizer=lambda parameters: SGD(parameters, lr=0.1))
    assert not dy.steps.replay(own, start, BATCHES[0]).equals(start)


def test_manual_optimization_is_refused():
    module = Plain()
    module.automatic_optimization = False
    with pytest.raises(RecipeError, match="Plain optimizes by hand"):
        dy.Recipe.from_lightning(module)


def test_a_step_that_fetches_its_own_batches_is_refused():
    with pytest.raises(RecipeError, match="dataloader_iter"):
        dy.Recipe.from_lightning(with_step(lambda self, dataloader_iter: None))


def test_what_is_no_lightning_module_is_refused():
    with pytest.raises(RecipeError, match="Linear is not a LightningModule"):
        dy.Recipe.from_lightning(nn.Linear(1, 1))


def test_a_module_that_cannot_be_copied_is_refused_with_the_reason():
    module = Rich()
    module.last_loss = module.head.weight.sum()
    with pytest.raises(RecipeError, match=r"Rich cannot be copied: .*deepcopy"):
        dy.Recipe.from_lightning(module)


def test_hooks_that_the_step_goes_without_are_logged(caplog):
    class Hooked(Plain):
        def on_after_backward(self):
            raise AssertionError

        def optimizer_step(self, *args, **kwargs):
            raise AssertionError

    with caplog.at_level(logging.WARNING):
        dy.Recipe.from_lightning(Plain())
        assert caplog.messages == []
        recipe = dy.Recipe.from_lightning(Hooked())
    assert caplog.messages == [
        "Hooked has its own on_after_backward, optimizer_step, which only a Trainer calls: the recipe's step "
        "goes without."
    ]
    dy.steps.replay(recipe, Checkpoint.capture(recipe.model), BATCHES[0])
