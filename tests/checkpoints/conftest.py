"""A tiny model with everything that makes checkpoints hard: ties, frozen weights, buffers, dropout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from checkpoints import Checkpoint, TrajectoryWriter


class Tiny(nn.Module):
    def __init__(self, seed: int = 0, d_model: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(6, d_model)
            self.frozen = nn.Linear(d_model, d_model)
            self.norm = nn.BatchNorm1d(d_model)
            self.drop = nn.Dropout(0.5)
            self.unembed = nn.Linear(d_model, 6)
        self.unembed.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.full((), 2.0 + seed), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.frozen(self.embed(tokens))))
        return self.unembed(self.scale * hidden)


def train(model: nn.Module, optimizer: Optimizer, steps: range, scheduler: LRScheduler | None = None) -> None:
    """Batch `step` is a function of the step alone; dropout draws from the global generator."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(6, (8,), generator=generator)

        def loss(tokens: Tensor = tokens) -> Tensor:
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 6)
            value.backward()
            return value

        optimizer.step(loss)
        if scheduler is not None:
            scheduler.step()


@pytest.fixture
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(name="train")
def train_fixture() -> Callable[..., None]:
    return train


@pytest.fixture
def small() -> Callable[..., Checkpoint]:
    """A checkpoint of one tensor."""

    def make(step: int, value: float = 0.0) -> Checkpoint:
        empty = Checkpoint.capture(nn.Module(), step=step)
        return replace(empty, parameters={"w": torch.full((3,), value)})

    return make


@pytest.fixture
def files() -> Callable[[Path], list[str]]:
    """All files below a folder."""
    return lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def trained() -> tuple[Tiny, Optimizer]:
    """A model and its AdamW after three steps."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, range(3))
    return model, optimizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the states before batches 0, 10 and 20."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with TrajectoryWriter.create(tmp_path / "run", {"seed": 3, "betas": (0.9, 0.95)}) as writer:
        for step in (0, 10, 20):
            writer.append(Checkpoint.capture(model, optimizer, step=step, begins_optimizer=step == 0))
            train(model, optimizer, range(step, step + 2))
    return tmp_path / "run"
