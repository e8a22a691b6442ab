"""LightningModules of users, and how they are trained here."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, StepLR

from tests.zoo.small_models import points

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningModule, Trainer
    from torchmetrics import CatMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryWriter, schedule
from dynamics.training import TrajectoryRecorder

BATCHES = [points(seed) for seed in range(4)]


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


PAIR = dy.Contrast(points(10), points(11), points(12))


def gradient(module, batch=BATCHES[0]):
    recipe = dy.Recipe.from_lightning(module)
    return dy.steps.gradient(recipe, Checkpoint.capture(recipe.model), batch)
