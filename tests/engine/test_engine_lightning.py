"""Recipe.from_lightning beside real Trainers: the step a LightningModule takes, and the module left alone."""

import copy
import dataclasses
import gc
import logging
import random
import warnings
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_models import Live, margin, points
from engine_oracle import seed_patch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.fabric import Fabric
    from lightning.pytorch import LightningModule, Trainer
    from torchmetrics import CatMetric, MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryWriter, schedule
from checkpoints.values import copied, differences
from dynamics import sites
from dynamics.recipe import ByNorm, ByValue, RecipeError
from dynamics.training import TrajectoryRecorder

BATCHES = [points(seed) for seed in range(4)]


# --- modules of users -------------------------------------------------------------------------------------


class Plain(LightningModule):
    """The least there is: layers, a loss, SGD."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.body = nn.Linear(5, 8)
            self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.head(self.body(x).tanh())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1, momentum=0.9)


class Rich(Plain):
    """What modules do: groups by name, warm-up, logging, metrics, dropout, batch norm, lists of outputs."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.save_hyperparameters()
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("average", torch.zeros(8))
        self.accuracy = MulticlassAccuracy(3)
        self.both = MetricCollection([MulticlassAccuracy(3, average="micro"), MulticlassF1Score(3)])
        self.kept = CatMetric()
        self.outputs = {"train": []}
        self.seen = 0
        self.double()

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x)).tanh()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y) + 0.01 * (self.head.weight**2).sum()
        self.average = 0.9 * self.average + 0.1 * self.body.weight.detach().sum(-1)
        self.accuracy(logits, y)
        self.kept.update(logits.detach())
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        self.log_dict(self.both(logits, y))
        self.outputs["train"].append(loss)
        self.seen += 1
        self.last_loss = loss
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self):
        decayed = [p for name, p in self.named_parameters() if name.endswith("weight") and "norm" not in name]
        rest = [
            p for name, p in self.named_parameters() if not (name.endswith("weight") and "norm" not in name)
        ]
        optimizer = AdamW(
            [
                {"params": rest, "weight_decay": 0.0, "lr": 0.02},
                {"params": decayed, "weight_decay": 0.3},
            ],
            lr=0.01,
        )
        warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


class ByModuleType(Plain):
    """Decay for linear layers only, found through named_modules; the first layer's bias is frozen."""

    def __init__(self):
        super().__init__()
        self.scale = nn.LayerNorm(8)
        self.body.bias.requires_grad_(False)
        self.double()

    def forward(self, x):
        return self.head(self.scale(self.body(x)).tanh())

    def configure_optimizers(self):
        decayed = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        groups = {True: [], False: []}
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups[name in decayed].append(p)
        return AdamW([{"params": groups[d], "weight_decay": 0.5 * d} for d in (False, True)], lr=0.01)


class FreezesLate(Plain):
    """Freezes a layer where it makes its optimizer, which gets all parameters."""

    def configure_optimizers(self):
        self.body.requires_grad_(False)
        return AdamW(self.parameters(), lr=0.01)


class HoldsItsOptimizer(Plain):
    """Made in __init__ already."""

    def __init__(self):
        super().__init__()
        self.optimizer = AdamW(self.parameters(), lr=0.01)

    def configure_optimizers(self):
        scheduler = StepLR(self.optimizer, 2, 0.5)
        return [self.optimizer], [{"scheduler": scheduler, "interval": "step"}]


class HoldsItsGroups(Plain):
    """Which torch makes its own: an optimizer writes its settings into the dicts that it is given."""

    def __init__(self):
        super().__init__()
        self.groups = [{"params": list(self.head.parameters()), "lr": 0.02}, {"params": [self.body.weight]}]

    def configure_optimizers(self):
        return AdamW(self.groups, lr=0.01)


class Recurrent(Plain):
    """An LSTM keeps its parameters in a list of its own as well."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.lstm = nn.LSTM(5, 8)
        self.lstm.bias_hh_l0.requires_grad_(False)
        self.double()

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Tied(Plain):
    """Two names for one parameter."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Linear(5, 8).double()
        self.twin.weight = self.body.weight

    def forward(self, x):
        return self.head((self.body(x) + self.twin(x)).tanh())


class Nested(LightningModule):
    """A LightningModule inside another, and what may be asked without a Trainer."""

    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def training_step(self, batch):
        self.print("a step")
        if self.logger is not None and self.global_rank == 0:
            self.logger.log_metrics({})
        return self.inner.training_step(batch, 0)

    def configure_optimizers(self):
        return self.inner.configure_optimizers()


def with_optimizers(configure, base=Plain):
    """A module whose configure_optimizers is the given function of an optimizer over its parameters."""

    class Configured(base):
        def configure_optimizers(self):
            return configure(AdamW(self.parameters(), lr=0.01))

    return Configured()


def with_step(step, base=Plain):
    class Stepping(base):
        training_step = step

    return Stepping()


# --- training ---------------------------------------------------------------------------------------------


class Batches(list):
    """Lightning collates a plain list of samples, but iterates this."""


def recorded(folder, module, epochs=1, seed=7, **settings) -> Trajectory:
    """Real training, with a checkpoint before every step and after the last."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        with TrajectoryWriter.create(folder, config={}) as writer:
            Trainer(
                accelerator="cpu",
                max_epochs=epochs,
                callbacks=[TrajectoryRecorder(writer, schedule.every(1, epochs * len(BATCHES)))],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **settings,
            ).fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    return Trajectory.open(folder)


def assert_replays(recipe, run, steps=(0, 1, 2, 3)):
    for step in steps:
        replayed = dy.steps.replay(recipe, run.at(step), BATCHES[step % len(BATCHES)])
        assert replayed.differences(run.at(step + 1)) == [], step
        assert replayed.rng_differences(run.at(step + 1)) == [], step


CLIPS = {
    "unclipped": (None, {}),
    "by norm": (ByNorm(0.1), {"gradient_clip_val": 0.1}),
    "by value": (ByValue(0.01), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
}


@pytest.mark.parametrize("clip", CLIPS)
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


@pytest.mark.parametrize(
    "kind", [Plain, ByModuleType, FreezesLate, HoldsItsOptimizer, HoldsItsGroups, Recurrent, Tied, Nested]
)
def test_modules_of_all_kinds_replay_bitwise(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind()
    recipe = dy.Recipe.from_lightning(module)
    assert_replays(recipe, recorded(tmp_path / "run", module))


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


# --- what configure_optimizers returns --------------------------------------------------------------------

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


# --- parameters and optimizers ----------------------------------------------------------------------------


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


# --- schedulers that do not move after every step ---------------------------------------------------------

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


# --- the verbs --------------------------------------------------------------------------------------------

PAIR = dy.Contrast(points(10), points(11), points(12))


def loss_by_hand(model, batch):
    """What Rich.training_step returns, without its bookkeeping."""
    x, y = batch
    return F.cross_entropy(model(x), y) + 0.01 * (model.head.weight**2).sum()


class Unnormed(Rich):
    def __init__(self):
        super().__init__(dropout=0.0)
        self.norm = nn.Identity()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A module after real training with clipping, beside its optimizer, and the checkpoint of that moment."""
    module = Unnormed()
    run = recorded(tmp_path_factory.mktemp("trained") / "run", module, gradient_clip_val=0.1)
    return Live(module, module.trainer.optimizers[0], None, [run.at(4)])


def last_state_cleared(module):
    module.last_loss = None
    module.outputs["train"].clear()
    return module


@pytest.mark.parametrize("start", ["stored", "fresh"])
def test_patched_gradients_equal_the_seeds_algorithm(trained, start):
    last_state_cleared(trained.model)
    recipe = dy.Recipe.from_lightning(trained.model, clip=ByNorm(0.1))
    patched = [*sites.parameters(recipe.model), sites.Site("row", {"head.weight": (slice(0, 1),)})]
    checkpoint, live = trained.last, trained
    if start == "fresh":
        checkpoint, live = checkpoint.with_fresh_optimizer(), copy.deepcopy(trained)
        live.optimizer.state.clear()
    result = dy.patch_gradients(recipe, checkpoint, [PAIR], patched, {"margin": margin})
    oracle = dy.Recipe(live.model, loss_by_hand, clip=ByNorm(0.1))
    for site in patched:
        expected = seed_patch(oracle, live, PAIR, site, {"margin": margin})["margin"]
        found = result["patched"].sel(site=site.label, measure="margin").item()
        assert abs(found - expected) < 1e-10 * max(1.0, abs(expected)), site.label
    assert abs(result["effect"]).min() > 1e-8


def test_patched_updates_are_selections_between_two_real_steps(trained):
    last_state_cleared(trained.model)
    recipe = dy.Recipe.from_lightning(trained.model, clip=ByNorm(0.1))
    patched = sites.parameters(recipe.model)
    result = dy.patch_updates(recipe, trained.last, [PAIR], patched, margin)
    oracle = dy.Recipe(trained.model, loss_by_hand, clip=ByNorm(0.1))
    for name, batch in (("base", PAIR.base), ("source", PAIR.source)):
        same = dy.Contrast(batch, batch, PAIR.probe)
        expected = seed_patch(oracle, trained, same, patched[0], {"margin": margin})["margin"]
        assert abs(result[name].item() - expected) < 1e-10
    after = {
        name: dy.steps.replay(recipe, trained.last, batch).parameters
        for name, batch in (("base", PAIR.base), ("source", PAIR.source))
    }
    for site in patched:
        model = copy.deepcopy(trained.model).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(after["source" if name in site.covers else "base"][name])
            expected = margin(model, PAIR.probe).mean().item()
        assert abs(result["patched"].sel(site=site.label).item() - expected) < 1e-10


@pytest.mark.parametrize("kind", [Rich, ByModuleType, FreezesLate, HoldsItsGroups, Recurrent, Tied])
def test_steps_taken_at_once_equal_steps_taken_one_by_one(kind):
    recipe = dy.Recipe.from_lightning(kind(), clip=ByNorm(0.1))
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    start = Checkpoint.capture(recipe.model, optimizer, recipe.build_scheduler(optimizer))
    start = dy.steps.replay(recipe, start, BATCHES[0])
    many = [dy.steps.gradient(recipe, start, batch).gradients for batch in BATCHES[1:]]
    for taken, gradients in zip(dy.steps.steps_from(recipe, start, many), many, strict=True):
        alone = dy.steps.step_from(recipe, start, gradients)
        moved = [n for n in alone if not torch.equal(alone[n], start.parameters[n])]
        held = {n for group in start.optimizer.groups for n in group["params"]}
        assert moved == [n for n, g in gradients.items() if g is not None and n in held]
        assert all((taken[n] - alone[n]).abs().max() < 1e-14 for n in alone)


# --- training steps ---------------------------------------------------------------------------------------


def gradient(module, batch=BATCHES[0]):
    recipe = dy.Recipe.from_lightning(module)
    return dy.steps.gradient(recipe, Checkpoint.capture(recipe.model), batch)


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


# --- nothing of the user's changes ------------------------------------------------------------------------


def seen(module):
    """All that could change in a module and around it, as a plain value."""
    named = [*module.named_parameters(), *module.named_buffers()]
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "tensors": dict(named),
        "identities": [id(tensor) for _, tensor in named],
        "requires_grad": [tensor.requires_grad for _, tensor in named],
        "grad": {name: tensor.grad for name, tensor in named},
        "modes": [part.training for part in module.modules()],
        "hooks": [[*part._forward_hooks, *part._forward_pre_hooks] for part in module.modules()],
        "attributes": [attributes(part) for part in module.modules()],
        "torch": torch.get_rng_state(),
        "python": [version, *words, gauss],
        "numpy": [*legacy["state"]["key"].tolist(), legacy["state"]["pos"]],
    }


def attributes(part):
    internal = vars(nn.Module())
    return {name: plain(value) for name, value in vars(part).items() if name not in internal}


def plain(value):
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor | str | int | float | None):
        return value
    return f"{type(value).__name__} at {id(value)}"


class Restless(Rich):
    """Draws from every generator, moves every attribute, and fails where it is told to."""

    fails = False

    def __init__(self):
        super().__init__()
        self.total = torch.zeros(())
        self.mean = MeanMetric()
        self.recent = {"losses": [torch.ones(2)], "names": {"a"}}
        self.encoder_hook = self.body.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.recent["losses"].append(output)

    def training_step(self, batch, batch_idx):
        returned = Rich.training_step(self, batch, batch_idx)
        noise = torch.randn(()).double() + random.random() + np.random.rand()  # noqa: NPY002
        self.total += 1
        self.mean.update(noise.detach())
        self.recent["names"].add("b")
        self.recent["more"] = returned
        self.recent = {}
        self.drop.eval()
        del self.seen
        if self.fails:
            raise Broken
        return {"loss": returned["loss"] * noise.abs() * self.total}

    def configure_optimizers(self):
        self.anneal = torch.rand(())
        random.random()
        self.log("never", 1.0)
        if self.fails:
            raise Broken
        return super().configure_optimizers()


class Broken(Exception):
    """Raised by a method of the user's."""


def restless():
    module = Restless()
    module.norm.eval()
    module.head.weight.grad = torch.ones_like(module.head.weight)
    module.accuracy.update(torch.eye(3), torch.arange(3))
    module.both.update(torch.eye(3), torch.arange(3))
    module.kept.update(torch.ones(2))
    return module


def use_everything(recipe):
    start = Checkpoint.capture(recipe.model)
    for verb in (dy.patch_gradients, dy.patch_updates):
        verb(recipe, None, [PAIR], sites.parameters(recipe.model), margin)
    dy.steps.replay(recipe, start, BATCHES[0])


def test_the_users_module_is_as_it_was():
    module = restless()
    before = copied(seen(module))
    recipe = dy.Recipe.from_lightning(module, clip=ByNorm(0.1))
    assert differences(before, copied(seen(module))) == []
    use_everything(recipe)
    assert differences(before, copied(seen(module))) == []


METHODS = {
    "training_step": lambda recipe, start: dy.steps.gradient(recipe, start, BATCHES[0]),
    "configure_optimizers": lambda recipe, start: dy.steps.replay(recipe, start, BATCHES[0]),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_users_module_is_as_it_was_when_its_method_fails(method):
    module = restless()
    before = copied(seen(module))
    recipe = dy.Recipe.from_lightning(module)
    recipe.model.fails = True
    start = Checkpoint.capture(recipe.model)
    with pytest.raises(Broken):
        METHODS[method](recipe, start)
    module.fails = True
    with pytest.raises(Broken):
        dy.Recipe.from_lightning(module)
    del module.fails
    assert differences(before, copied(seen(module))) == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_recipes_model_is_as_it_was_after_every_step(fails):
    """Metrics empty, lists no longer, nothing that holds a graph; so the second call sees what the first saw."""
    recipe = dy.Recipe.from_lightning(restless())
    recipe.model.fails = fails
    before = copied(seen(recipe.model))
    checkpoint = Checkpoint.capture(recipe.model)
    losses = set()
    for _ in range(3):
        with pytest.raises(Broken) if fails else nullcontext():
            losses.add(dy.steps.gradient(recipe, checkpoint, BATCHES[0]).loss.item())
        assert differences(before, copied(seen(recipe.model))) == []
    assert len(losses) == (not fails)
    copy.deepcopy(recipe.model)


def test_attributes_that_name_a_buffer_or_a_tensor_with_a_gradient_keep_naming_it():
    module = Rich()
    module.mean, module.extra = module.norm.running_mean, torch.ones(3, requires_grad=True)
    model = dy.Recipe.from_lightning(module).model
    extra = model.extra
    dy.Recipe.from_lightning(module).loss(model, BATCHES[0])
    assert model.mean is model.norm.running_mean
    assert model.mean.any()
    assert model.extra is extra


def test_a_step_leaves_no_activation_behind():
    recipe = dy.Recipe.from_lightning(restless())
    outputs = []
    recipe.model.drop.register_forward_hook(lambda module, i, output: outputs.append(weakref.ref(output)))
    dy.steps.gradient(recipe, Checkpoint.capture(recipe.model), BATCHES[0])
    gc.collect()
    assert [output() for output in outputs] == [None]


def test_hooks_of_others_on_the_recipes_model_keep_what_they_saw():
    """A step runs on the very modules of recipe.model, so that a hook on them can record."""
    recipe = dy.Recipe.from_lightning(Rich())
    outputs = []
    handle = recipe.model.body.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    dy.steps.gradient(recipe, Checkpoint.capture(recipe.model), BATCHES[0])
    handle.remove()
    assert len(outputs) == 1
