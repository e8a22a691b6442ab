"""A start that fails leaves its folder to the next one; accelerator, logger and threads do not define a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from checkpoints import Trajectory, TrajectoryError, TrajectoryWriter
from dynamics.config import StudyConfig
from dynamics.tasks import AliasTask
from dynamics.training import RunError, fit

pytestmark = pytest.mark.slow


def with_trainer(config: StudyConfig, **settings: object) -> StudyConfig:
    return replace(config, trainer=replace(config.trainer, **settings))


def with_decay(config: StudyConfig, decay: float) -> StudyConfig:
    return replace(config, phases=replace(config.phases, weight_decay=decay))


@pytest.fixture
def short(config: StudyConfig) -> StudyConfig:
    """Nine steps in three phases."""
    phases = {name: replace(phase, steps=3) for name, phase in config.phases.by_name.items()}
    patching = replace(config.patching, x2_steps=(0,), primary=replace(config.patching.primary, x2_step=0))
    return replace(config, phases=replace(config.phases, **phases), patching=patching)


def interrupted_at(step: int, config: StudyConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AliasTask.batch

    def batch(self: AliasTask, wanted: int) -> object:
        if wanted == step:
            raise KeyboardInterrupt
        return honest(self, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(AliasTask, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            fit(config, out)


def test_a_run_without_a_checkpoint_gives_way_to_another(short, tmp_path, monkeypatch):
    def fails(self):
        raise MemoryError("the model is too large")

    with monkeypatch.context() as patch:
        patch.setattr(AliasTask, "recipe", fails)
        with pytest.raises(MemoryError):
            fit(with_decay(short, 0.5), tmp_path)
    assert Trajectory.open(tmp_path).steps == ()
    run = fit(short, tmp_path)
    assert StudyConfig.from_dict(run.config) == short
    assert run.provenance["requested"] == short.to_dict()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == short.to_dict()
    assert run.steps[-1] == 9


def test_a_start_that_wrote_no_manifest_leaves_the_folder_usable(short, tmp_path, monkeypatch):
    def fails(self, manifest):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryWriter, "_replace_manifest", fails)
        with pytest.raises(OSError, match="no space left"):
            fit(short, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".writer.lock", "trajectory"}
    assert fit(short, tmp_path).steps[-1] == 9


def test_checkpoints_whose_manifest_was_lost_are_not_written_over(short, tmp_path):
    checkpoint = tmp_path / "trajectory" / "step-00000003.h5"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"precious")
    with pytest.raises(TrajectoryError, match="already holds a run"):
        fit(short, tmp_path)
    assert checkpoint.read_bytes() == b"precious"
    assert not (tmp_path / "manifest.json").exists()


def test_a_run_goes_on_with_another_accelerator_logger_and_threads(short, tmp_path, monkeypatch):
    whole = fit(short, tmp_path / "whole")
    out = tmp_path / "run"
    interrupted_at(0, with_trainer(short, accelerator="cpu"), out, monkeypatch)
    interrupted_at(4, with_trainer(short, accelerator="cpu", threads=2), out, monkeypatch)
    run = fit(with_trainer(short, accelerator="auto", threads=3), out)
    assert run.steps == whole.steps
    assert all(run.at(step).equals(whole.at(step)) for step in run.steps)
    assert run.config["trainer"] == {**short.to_dict()["trainer"], "accelerator": "auto", "threads": 3}
    assert yaml.safe_load((out / "config.yaml").read_text()) == run.config
    manifest = (out / "manifest.json").read_bytes()
    asked = with_trainer(short, accelerator="cuda", logger="wandb", threads=7)
    assert fit(asked, out).steps == run.steps  # nothing is left to train
    assert (out / "manifest.json").read_bytes() == manifest


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for an accelerator that is not there")
def test_an_accelerator_that_is_not_there_costs_nothing(short, tmp_path):
    with pytest.raises(MisconfigurationException, match="CUDA"):
        fit(with_trainer(short, accelerator="cuda"), tmp_path)
    assert fit(with_trainer(short, accelerator="cpu"), tmp_path).steps[-1] == 9


def test_precision_defines_a_run(short, tmp_path, monkeypatch):
    interrupted_at(0, short, tmp_path, monkeypatch)
    with pytest.raises(RunError, match=r"there trainer\.precision is 32-true, here bf16-mixed"):
        fit(with_trainer(short, precision="bf16-mixed", threads=4), tmp_path)


def test_a_phase_that_stopped_early_stays_as_long_as_it_was_under_other_threads(short, tmp_path, monkeypatch):
    early = replace(short, phases=replace(short.phases, stop_pretrain_at=100.0))
    interrupted_at(2, early, tmp_path, monkeypatch)
    run = fit(with_trainer(early, threads=2), tmp_path)
    kept = StudyConfig.from_dict(run.config)
    assert (kept.phases.pretrain.steps, kept.trainer.threads) == (1, 2)
    assert run.steps[-1] == 7
