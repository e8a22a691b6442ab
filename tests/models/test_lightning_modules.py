"""Recipe.from_lightning beside real Trainers: the steps a LightningModule takes."""

import dataclasses
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ChainedScheduler, OneCycleLR, ReduceLROnPlateau, StepLR

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.fabric import Fabric
    from lightning.pytorch import LightningModule

import dynamics as dy
from dynamics.recipe import ByNorm, ByValue, RecipeError
from tests.zoo.cases import first_quick
from tests.zoo.lightning_modules import (
    BATCHES,
    ByModuleType,
    FreezesLate,
    HoldsItsGroups,
    HoldsItsOptimizer,
    Nested,
    Plain,
    Recurrent,
    Rich,
    Tied,
    assert_replays,
    gradient,
    recorded,
    with_optimizers,
    with_step,
)


class Batches(list):
    """Lightning collates a plain list of samples, but iterates this."""


CLIPS = {
    "unclipped": (None, {}),
    "by norm": (ByNorm(0.1), {"gradient_clip_val": 0.1}),
    "by value": (ByValue(0.01), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
}


@pytest.mark.parametrize("clip", first_quick(CLIPS))
def test_replay_equals_what_the_trainer_did_bitwise(clip, tmp_path):
    """Groups, warm-up, logging, metrics, dropout, batch norm, an assigned buffer, generators."""
    ours, theirs = CLIPS[clip]
    run = recorded(tmp_path / "run", Rich(), **theirs)
    assert len(run.at(1).optimizer.groups) == 2
    assert_replays(dy.Recipe.from_lightning(Rich(), clip=ours), run)


def test_replaying_many_steps_equals_the_trainers_last_checkpoint_bitwise(tmp_path):
    run = recorded(tmp_path / "run", Rich())
    recipe = dy.Recipe.from_lightning(Rich())
    last = dy.steps.advance(recipe, run.at(0), 4, lambda step: BATCHES[step])
    assert last.differences(run.at(4)) == []
    assert last.rng_differences(run.at(4)) == []


def test_a_module_that_a_trainer_has_trained_is_as_good_as_a_new_one(tmp_path):
    module = Rich()
    run = recorded(tmp_path / "run", module)
    module.last_loss, module.outputs = None, {"train": []}
    recipe = dy.Recipe.from_lightning(module)
    assert_replays(recipe, run)
    assert recipe.model._trainer is None
    assert module.trainer is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [Plain, ByModuleType, FreezesLate, HoldsItsOptimizer, HoldsItsGroups, Recurrent, Tied, Nested]
)
def test_modules_of_all_kinds_replay_bitwise(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind()
    recipe = dy.Recipe.from_lightning(module)
    assert_replays(recipe, recorded(tmp_path / "run", module))


@pytest.mark.slow
def test_a_module_that_a_fabric_trains_is_read_without_it():
    module = with_step(lambda self, batch: self.trainer.max_epochs)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.setup(module, module.configure_optimizers())
    with pytest.raises(RecipeError, match="asks its Trainer for max_epochs"):
        gradient(module)
    assert module.fabric.device == fabric.device
    del fabric
    gc.collect()
    with pytest.raises(RecipeError, match="asks its Trainer for max_epochs"):
        gradient(module)


def test_a_base_class_of_the_users_may_be_called_lightning_module():
    recipe = dy.Recipe.from_lightning(type("LightningModule", (Plain,), {})())
    assert recipe.loss(recipe.model, BATCHES[0]) > 0
    assert recipe.optimizer is not None


def test_the_wrong_clipping_does_not_replay(tmp_path):
    run = recorded(tmp_path / "run", Rich(), gradient_clip_val=0.1)
    replayed = dy.steps.replay(dy.Recipe.from_lightning(Rich(), ByNorm(0.2)), run.at(1), BATCHES[1])
    assert replayed.differences(run.at(2)) != []


def in_two_groups(optimizer):
    given = optimizer.param_groups[0]["params"]
    vectors, matrices = ([p for p in given if (p.ndim > 1) == several] for several in (False, True))
    return AdamW([{"params": vectors}, {"params": matrices, "weight_decay": 0.1}], lr=0.01)


@pytest.mark.slow
def test_a_clip_counts_the_optimizers_parameters_as_lightning_does(tmp_path):
    run = recorded(tmp_path / "run", with_optimizers(in_two_groups), epochs=5, gradient_clip_val=0.1)
    recipe = dy.Recipe.from_lightning(with_optimizers(in_two_groups), ByNorm(0.1))
    assert recipe.clip == ByNorm(0.1, over="optimizer")
    for step in range(20):
        replayed = dy.steps.replay(recipe, run.at(step), BATCHES[step % len(BATCHES)])
        assert replayed.differences(run.at(step + 1)) == []


def test_accumulated_batches_replay_with_their_dropout(tmp_path):
    run = recorded(tmp_path / "run", Rich(), accumulate_grad_batches=2)
    recipe = dataclasses.replace(dy.Recipe.from_lightning(Rich()), accumulate=2)
    for step in (0, 1):
        replayed = dy.steps.replay(recipe, run.at(step), BATCHES[2 * step : 2 * step + 2])
        assert replayed.differences(run.at(step + 1)) == []


def logs_its_rate(module, batch, batch_idx):
    module.log("rate", module.trainer.optimizers[0].param_groups[0]["lr"])
    for i, group in enumerate(module.trainer.optimizers[0].param_groups):
        module.log(f"rate {i}", group["lr"])
    module.log("decay", module.trainer.optimizers[0].param_groups[-1]["weight_decay"] * 1e3)
    return Plain.training_step(module, batch, batch_idx)


def test_a_step_that_logs_its_learning_rate_replays(tmp_path):
    run = recorded(tmp_path / "run", with_step(logs_its_rate))
    assert_replays(dy.Recipe.from_lightning(with_step(logs_its_rate)), run)


def test_a_loss_made_of_a_logged_rate_is_not_finite():
    def step(module, batch, batch_idx):
        return (
            Plain.training_step(module, batch, batch_idx) * module.trainer.optimizers[0].param_groups[0]["lr"]
        )

    recipe = dy.Recipe.from_lightning(with_step(step))
    with pytest.raises(dy.steps.NonFiniteGradient):
        dy.steps.gradient(recipe, dy.Checkpoint.capture(recipe.model), BATCHES[0])


every_step = {"interval": "step"}
FORMS = {
    "an optimizer": lambda o: o,
    "a list": lambda o: [o],
    "a tuple": lambda o: (o,),
    "two lists": lambda o: ([o], [StepLR(o, 100)]),
    "two lists in a list": lambda o: [[o], [StepLR(o, 100)]],
    "a list and a scheduler": lambda o: ([o], StepLR(o, 100)),
    "no schedulers": lambda o: ([o], []),
    "two lists with a config": lambda o: ([o], [{"scheduler": StepLR(o, 2, 0.5), **every_step}]),
    "a dict": lambda o: {"optimizer": o},
    "a dict with a scheduler": lambda o: {"optimizer": o, "lr_scheduler": StepLR(o, 100)},
    "a dict with a config": lambda o: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": StepLR(o, 2, 0.5), **every_step, "frequency": 1, "name": "rate"},
    },
    "a dict that waits for a metric": lambda o: {
        "optimizer": o,
        "lr_scheduler": ReduceLROnPlateau(o),
        "monitor": "loss",
    },
    "a list of dicts": lambda o: [
        {"optimizer": o, "lr_scheduler": {"scheduler": OneCycleLR(o, 0.05, 8), **every_step}}
    ],
    "a tuple of dicts": lambda o: ({"optimizer": o, "lr_scheduler": StepLR(o, 100)},),
    "chained schedulers": lambda o: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": ChainedScheduler([StepLR(o, 2, 0.5), StepLR(o, 3, 0.5)]), **every_step},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_configure_optimizers_replays_bitwise_within_an_epoch(form, tmp_path):
    def step(self, batch):
        loss = Plain.training_step(self, batch, 0)
        self.log("loss", loss, on_epoch=True)
        return loss

    class Logging(Plain):
        training_step = step

    module = with_optimizers(FORMS[form], Logging)
    run = recorded(tmp_path / "run", module)
    recipe = dy.Recipe.from_lightning(module)
    assert (recipe.scheduler is None) == (run.at(0).scheduler is None)
    ends_with_an_epoch = recipe.scheduler is not None and not (form.endswith("config") or "step" in form)
    assert_replays(recipe, run, range(3 if ends_with_an_epoch and "cycle" not in form else 4))


def test_configured_without_an_optimizer_the_recipe_has_none():
    recipe = dy.Recipe.from_lightning(with_optimizers(lambda o: None))
    assert recipe.optimizer is None
    assert recipe.scheduler is None


def test_methods_that_a_module_does_not_have_are_absent_from_the_recipe():
    class Bare(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

    recipe = dy.Recipe.from_lightning(Bare())
    assert (recipe.loss, recipe.optimizer, recipe.scheduler) == (None, None, None)
    with pytest.raises(RecipeError, match="give the recipe loss"):
        recipe.require_loss()


@pytest.mark.parametrize(
    "form",
    [
        lambda o: "adam",
        lambda o: {"optimiser": o},
        lambda o: [o, StepLR(o, 1)],
        lambda o: [{"lr_scheduler": StepLR(o, 1)}],
        lambda o: {"optimizer": o, "lr_scheduler": {"schedule": StepLR(o, 1)}},
        lambda o: ([o], ["step"]),
    ],
)
def test_what_lightning_does_not_take_either_is_refused_by_name(form):
    with pytest.raises(
        RecipeError, match=r"Configured.configure_optimizers returns .* Lightning takes an opt"
    ):
        dy.Recipe.from_lightning(with_optimizers(form))


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda o: [o, SGD(o.param_groups[0]["params"], lr=1.0)], "2 optimizers and 0"),
        (lambda o: ({"optimizer": o}, {"optimizer": SGD(o.param_groups[0]["params"], lr=1.0)}), "2 opt"),
        (lambda o: ([o], [StepLR(o, 1), StepLR(o, 2)]), "1 optimizers and 2 schedulers"),
    ],
)
def test_several_optimizers_or_schedulers_are_refused(form, found):
    with pytest.raises(RecipeError, match=found):
        dy.Recipe.from_lightning(with_optimizers(form))
