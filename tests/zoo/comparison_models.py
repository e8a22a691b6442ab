"""A small transformer, its checkpoints moved about, numpy's view of what it answers, and a short run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from checkpoints import Checkpoint, Trajectory, TrajectoryWriter
from dynamics import steps
from dynamics.batch import Batch
from dynamics.config import (
    AliasConfig,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    PrimaryConfig,
    StudyConfig,
    ToyConfig,
)
from dynamics.measures import cross_entropy
from dynamics.models.toy import ToyTransformer
from dynamics.recipe import Recipe
from dynamics.tasks import AliasTask

D_VOCAB = 9


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def jittered(state: Checkpoint, seed: int, step: int, scale: float = 0.2) -> Checkpoint:
    """The checkpoint with every parameter moved a little."""
    parameters = {
        name: p + scale * torch.randn(p.shape, generator=draws(seed + i), dtype=p.dtype)
        for i, (name, p) in enumerate(state.parameters.items())
    }
    return replace(state, parameters=parameters, step=step)


def questions(seed: int, rows: int = 7) -> Batch:
    generator = draws(seed)
    return Batch(
        torch.randint(D_VOCAB, (rows, 4), generator=generator),
        torch.randint(1, 4, (rows,), generator=generator),
        torch.randint(D_VOCAB, (rows,), generator=generator),
    )


def small_recipe() -> Recipe:
    config = ToyConfig(
        n_layers=2, n_heads=2, d_model=6, d_head=3, d_mlp=8, activation="gelu", dtype="float64", seed=1
    )
    return Recipe(ToyTransformer(config, D_VOCAB), cross_entropy, torch.optim.AdamW, max_grad_norm=1.0)


def living(recipe: Recipe, state: Checkpoint) -> nn.Module:
    """A model of its own with the checkpoint's weights."""
    model = copy.deepcopy(recipe.model)
    state.restore(model)
    return model.eval()


def logits(recipe: Recipe, state: Checkpoint, batch: Batch) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found = living(recipe, state)(batch.tokens)
    return np.stack([found[i, pos].numpy() for i, pos in enumerate(batch.target_pos)])


def softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(z - z.max())
    return e / e.sum()


def short_run(folder: Path, seed: int = 0) -> Trajectory:
    """A run of the alias task over twelve steps, every second checkpoint stored."""
    phase = PhaseConfig(4)
    config = StudyConfig(
        task=AliasConfig(modulus=8, multipliers=(2, 3), train_multipliers=1),
        model=ToyConfig(n_heads=2, d_model=8, d_head=4, d_mlp=8, n_layers=1),
        phases=PhasesConfig(pretrain=phase, x1=phase, x2=phase, batch_size=8),
        patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
        seed=seed,
    )
    task = AliasTask(config)
    recipe = task.recipe()
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    state = Checkpoint.capture(recipe.model, optimizer, recipe.build_scheduler(optimizer))
    with TrajectoryWriter.create(folder, config.to_dict()) as writer:
        for step in range(13):
            state = steps.advance(recipe, state, step, task.batch)
            if step % 2 == 0:
                writer.append(state)
    return Trajectory.open(folder)
