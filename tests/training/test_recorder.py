"""TrajectoryRecorder on LightningModules that are not ours."""

import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningModule, Trainer

from checkpoints import Checkpoint, Trajectory, TrajectoryWriter, schedule
from dynamics.training import TrajectoryRecorder


class Regression(LightningModule):
    """Two parameter groups, a scheduler, dropout, and a buffer that follows the weights (an EMA)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.ReLU())
        self.head = nn.Linear(8, 1)
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, index):
        x, y = batch
        self.average.mul_(0.9).add_(self.head.weight.detach()[0], alpha=0.1)
        loss = (self(x) - y).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        groups = [
            {"params": self.head.parameters(), "lr": 1e-2},
            {"params": self.body.parameters(), "weight_decay": 0.1},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(n):
    """Batches in a list of our own type: Lightning collates plain lists of samples, but iterates this."""
    generator = torch.Generator().manual_seed(1)
    return Batches(
        (torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(n)
    )


class Batches:
    def __init__(self, batches):
        self.batches = list(batches)

    def __getitem__(self, i):
        return self.batches[i]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def recorded(folder, module, batches, steps, accumulate=1) -> Trajectory:
    with TrajectoryWriter.create(folder, config={"who": "a user"}) as writer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5,
            callbacks=[TrajectoryRecorder(writer, steps)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, batches)
    return Trajectory.open(folder)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_recorded_step_equals_the_bare_loop_that_takes_it(tmp_path, accumulate):
    batches = data(8)
    torch.manual_seed(5)
    run = recorded(tmp_path / "run", Regression(), batches, schedule.every(1, 8), accumulate)
    assert run.steps == tuple(range(8 // accumulate + 1))
    assert run.config == {"who": "a user"}

    module = Regression()
    chosen = module.configure_optimizers()
    optimizer, scheduler = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    module.log = lambda *_: None
    first = run.at(0)
    with first.random_state():
        for step in range(8 // accumulate):
            here = Checkpoint.capture(module, optimizer, scheduler, step, begins_optimizer=step == 0)
            assert run.at(step).differences(here) == []
            assert run.at(step).rng_differences(here) == []
            optimizer.zero_grad()
            for i in range(accumulate):
                (module.training_step(batches[step * accumulate + i], 0) / accumulate).backward()
            # In the optimizer's order, as Lightning does: another order moves the norm's last bit.
            clipped = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(clipped, 0.5)
            optimizer.step()
            scheduler.step()


def test_names_are_the_modules_own_and_both_groups_are_kept(tmp_path):
    run = recorded(tmp_path / "run", Regression(), data(4), [2])
    assert run.steps == (2,)
    state = run.at(2)
    assert set(state.parameters) == {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}
    assert set(state.buffers) == {"average"}
    assert [group["params"] for group in state.optimizer.groups] == [
        ["head.weight", "head.bias"],
        ["body.0.weight", "body.0.bias"],
    ]
    assert [group["weight_decay"] for group in state.optimizer.groups] == [0.01, 0.1]


def test_a_wrapped_model_is_recorded_under_its_own_names(tmp_path):
    module = Regression()
    with TrajectoryWriter.create(tmp_path / "run", config={}) as writer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder = TrajectoryRecorder(writer, [1], model=module)
        wrapper = Wrapper(module)
        Trainer(
            accelerator="cpu",
            max_steps=2,
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
        ).fit(wrapper, data(2))
    assert "head.weight" in Trajectory.open(tmp_path / "run").at(1).parameters


class Wrapper(LightningModule):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def training_step(self, batch, index):
        return (self.inner(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner.parameters(), lr=0.1)
