"""The run that the ten checks are tried on."""

from __future__ import annotations

import pickle
import warnings
from functools import partial
from importlib.resources import files

import numpy as np
import pytest
import xarray as xr
import yaml

from checkpoints import Trajectory
from dynamics.config import StudyConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from dynamics.training import fit
from dynamics.studies import checks
from tests.zoo.checked_runs import N_ALIASES, Seen, checked, made


@pytest.fixture(scope="session")
def runs(made_once):
    """The smoke preset with two aliases in a set, shorter and in doubles: seeds 0 and 1."""
    preset = yaml.safe_load((files("dynamics") / "presets" / "smoke.yaml").read_text())
    preset["task"] = {"modulus": 8, "multipliers": [2, 3, 4], "train_multipliers": 2}
    preset["model"] |= {"dtype": "float64"}
    preset["phases"] |= {name: {"steps": n} for name, n in (("pretrain", 8), ("x1", 8), ("x2", 20))}
    preset["patching"] |= {"x2_steps": [0, 10]}
    preset["schedule"] = {"per_decade": 1, "dense": 0, "evaluate_every": 400}
    configs = [StudyConfig.from_dict({**preset, "seed": seed}) for seed in (0, 1)]
    return [Trajectory.open(made_once(f"checked-{c.seed}", partial(fit, c))) for c in configs]


@pytest.fixture(scope="session")
def run(runs):
    """Seed 0 at its fourth step of X2, with a new optimizer."""
    return made(runs[0])


@pytest.fixture
def texts(monkeypatch):
    return Seen(monkeypatch, "_text")


@pytest.fixture
def above(monkeypatch):
    return Seen(monkeypatch, "_above")


@pytest.fixture
def signs(monkeypatch):
    return Seen(monkeypatch, "_signs")


@pytest.fixture(scope="session")
def batteries(runs, made_once):
    """The ten checks of "embed" for either run alone and for both: made by one worker, read by all."""

    def make(folder):
        chosen = {"seed 0": runs[:1], "seed 1": runs[1:], "both": runs}
        folder.mkdir()
        found = {name: checked(some, site="embed") for name, some in chosen.items()}
        (folder / "found").write_bytes(pickle.dumps(found))

    return pickle.loads((made_once("batteries", make) / "found").read_bytes())


@pytest.fixture
def noise(monkeypatch):
    """What the impulse response is under noise, by draw and alias, in place of windows that take their time."""
    last = np.array([[0.5] * N_ALIASES, [-0.3] * N_ALIASES])
    found = xr.Dataset({"effect": (("noise", "step", "example"), np.stack([np.zeros_like(last), last], 1))})
    monkeypatch.setattr(checks, "under_noise", lambda ask, start, draws: found)
    return last
