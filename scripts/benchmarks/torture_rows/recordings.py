"""What the torture records and damages: small checkpoints, runs with each kind of file, a tiny study."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from lightning.pytorch import LightningModule, Trainer

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryWriter
from dynamics.config import (
    AliasConfig,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    PrimaryConfig,
    StudyConfig,
    ToyConfig,
)

TINY = StudyConfig(
    task=AliasConfig(modulus=8, multipliers=(2, 3, 4), train_multipliers=2),
    model=ToyConfig(n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=8),
    phases=PhasesConfig(pretrain=PhaseConfig(6), x1=PhaseConfig(6), x2=PhaseConfig(6)),
    patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
)


def state(step: int) -> Checkpoint:
    """A small checkpoint whose every number is its step, but for a frozen weight."""
    empty = Checkpoint.capture(torch.nn.Module(), step=step)
    parameters = {"w": torch.full((5_000,), float(step)), "frozen": torch.arange(2_000.0)}
    return replace(empty, parameters=parameters, frozen=("frozen",))


def record(folder: Path, n: int = 1_000_000) -> str:
    """Store checkpoints one after another, from where the run stands."""
    with TrajectoryWriter.resume(folder) as writer:
        first = max(writer.steps, default=-1) + 1
        for step in range(first, first + n):
            writer.append(state(step))
            (folder / "finished").write_text(str(step))
    return "done"


def opened(folder: Path, finished: int) -> str:
    """Whether a run opens whole with at least the checkpoints whose append had returned."""
    run = Trajectory.open(folder)
    if problems := run.verify():
        return f"BROKEN: {problems[0]}"
    if run.steps != tuple(range(len(run))) or len(run) < finished + 1:
        return f"BROKEN: {len(run)} checkpoints of {finished + 1} that were finished"
    if any(float(run.at(step).parameters["w"][7]) != step for step in run.steps[-2:]):
        return "BROKEN: other numbers"
    return "opens whole"


def effects() -> xr.Dataset:
    """A result of every type that a file holds."""
    generator = np.random.default_rng(0)
    values = {
        "effect": (("example", "site"), generator.normal(size=(20, 12))),
        "kept": ("site", np.arange(12) > 3),
    }
    return xr.Dataset(values, {"site": [f"L0H{n}" for n in range(12)]}, {"provenance": "{}", "seed": 3})


def a_run(folder: Path) -> Path:
    """A run with each kind of file."""
    with TrajectoryWriter.create(folder, {"lr": 0.01, "steps": 3}, {"commit": "none"}) as writer:
        for step in range(3):
            writer.append(state(step))
        writer.write_file("config.yaml", b"lr: 0.01\nsteps: 3\n")
        writer.write_file("metrics.csv", b"step,loss\n0,1.5\n1,1.25\n")
    dy.results.save(effects(), folder / "results" / "effects.h5")
    return folder


class Line(LightningModule):
    """The least that Lightning trains."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(3, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.line(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Marks(dy.training.TrajectoryRecorder):
    """A recorder that notes in a file which checkpoint was stored last."""

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        super().on_train_batch_start(trainer, *rest)
        (self.writer.path / "finished").write_text(str(trainer.global_step))


def recorded_by_lightning(folder: Path) -> str:
    """Every step of a Lightning loop stored."""
    warnings.simplefilter("ignore")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with TrajectoryWriter.resume(folder) as writer:
        Trainer(
            accelerator="cpu",
            max_steps=2_000,
            enable_model_summary=False,
            callbacks=[Marks(writer, range(2_001))],
            **quiet,
        ).fit(Line(), torch.utils.data.DataLoader(torch.randn(8_000, 3), batch_size=4))
    return "done"
