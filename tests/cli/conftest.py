"""Runs in miniature: trained by the command line, of the alias task, of somebody's own loop, imported."""

from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints import Checkpoint, Trajectory, TrajectoryWriter
from dynamics import tasks
from tests.cli.calling import TINY, succeed
from tests.zoo.cli_runs import ALIASES, BATCHES, squared_error


@pytest.fixture(scope="session")
def tiny_runs(made_once) -> list[Path]:
    """What `dynamics fit` makes of TINY with seeds 0 and 1; not to be written into."""
    return [
        made_once(
            f"tiny-{seed}", lambda out, seed=seed: succeed("fit", "--out", out, *TINY, f"--seed={seed}")
        )
        for seed in (0, 1)
    ]


@pytest.fixture
def alias_run(tmp_path) -> Path:
    """A folder with the alias task's model at a few steps."""
    model = tasks.aliases.load(ALIASES.to_dict()).model()
    with TrajectoryWriter.create(tmp_path / "aliases", ALIASES.to_dict()) as writer:
        for step in (0, 1, 2, 3, 7):
            writer.append(Checkpoint.capture(model, step=step))
    return tmp_path / "aliases"


@pytest.fixture
def own_model() -> nn.Module:
    """What the loop of one's own trains, at its beginning."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


@pytest.fixture
def own_run(tmp_path, own_model) -> Path:
    """Five steps of a loop of one's own, recorded at 0, 2, 3 and 5; its config names no task."""
    optimizer = torch.optim.AdamW(own_model.parameters(), lr=0.1)
    config = {"seed": 3, "task": {"name": "mnist"}, "lr": 0.1}
    with TrajectoryWriter.create(tmp_path / "own", config) as writer:
        for step in range(6):
            if step in (0, 2, 3, 5):
                writer.append(Checkpoint.capture(own_model, optimizer, step=step))
            optimizer.zero_grad()
            squared_error(own_model, BATCHES[step]).backward()
            optimizer.step()
    return tmp_path / "own"


@pytest.fixture
def imported_run(tmp_path) -> Path:
    """Two files of state dicts."""
    for step in (1, 20):
        torch.save({"w": torch.full((2, 3), float(step))}, tmp_path / f"model_{step}.pt")
    Trajectory.from_state_dicts(tmp_path, tmp_path / "imported")
    return tmp_path / "imported"
