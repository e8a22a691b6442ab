"""A study's run: replayable, resumable, refusing, stopping where it must."""

import shutil
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from checkpoints import Trajectory
from dynamics import studies
from dynamics.config import PhaseConfig, StudyConfig
from dynamics.tasks import AliasTask
from dynamics.training import NonFiniteLoss, RunError, fit


def assert_same(left: Trajectory, right: Trajectory) -> None:
    assert left.steps == right.steps
    for step in left.steps:
        mine, yours = left.at(step), right.at(step)
        assert mine.differences(yours) == [], f"step {step}"
        assert mine.rng_differences(yours) == [], f"step {step}"


@pytest.fixture
def run(config, made_once) -> Trajectory:
    """The run of the config, not to be written into."""
    return Trajectory.open(made_once("thirty-steps", partial(fit, config)))


@pytest.fixture
def copied(run, tmp_path) -> Trajectory:
    """The same, to be written into."""
    return Trajectory.open(shutil.copytree(run.path, tmp_path / "run"))


def test_every_stored_neighbour_of_a_run_replays_bit_for_bit(run):
    verdicts = list(studies.verify(run))
    assert len(verdicts) == len(run.steps) - 1 > 10
    assert [v for v in verdicts if v.differences] == []


@pytest.mark.slow
def test_verification_notices_a_step_that_training_did_not_take(config, run, tmp_path):
    other = fit(replace(config, phases=replace(config.phases, weight_decay=0.0)), tmp_path / "other")
    mixed = Trajectory.open(run.path)
    mixed.at = lambda step: (other if step == run.steps[5] else run).at(step)
    assert [v.stop for v in studies.verify(mixed) if v.differences] == list(run.steps[5:7])


def test_training_by_lightning_equals_a_bare_loop(config, run):
    task = AliasTask(config)
    recipe = task.recipe()
    model, phases = recipe.model, config.phases
    for step in range(phases.starts["end"]):
        if step in (0, phases.starts["x1"]):
            optimizer = recipe.optimizer(model.parameters())
        optimizer.param_groups[0]["lr"] = phases.learning_rate(step)
        optimizer.zero_grad()
        recipe.loss(model, task.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), phases.max_grad_norm)
        optimizer.step()
    for name, tensor in run.last.parameters.items():
        assert torch.equal(tensor, model.get_parameter(name)), name


@pytest.mark.slow
@pytest.mark.parametrize("at", [17, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 5, 12, 25))])
def test_a_run_interrupted_at_any_step_resumes_to_the_same_bits(config, run, tmp_path, monkeypatch, at):
    honest = AliasTask.batch

    def interrupt(self, step):
        if step == at:
            raise KeyboardInterrupt
        return honest(self, step)

    monkeypatch.setattr(AliasTask, "batch", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is handler
    stopped = Trajectory.open(tmp_path / "stopped")
    assert stopped.verify() == []
    assert stopped.steps[-1] <= at
    monkeypatch.setattr(AliasTask, "batch", honest)
    assert_same(fit(config, tmp_path / "stopped"), run)
    logged = [pd.read_csv(folder / "metrics.csv") for folder in (run.path, tmp_path / "stopped")]
    pd.testing.assert_frame_equal(*logged)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(config, run, copied, tmp_path):
    manifest = (tmp_path / "run" / "manifest.json").read_bytes()
    assert_same(fit(config, tmp_path / "run"), run)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == manifest


def test_a_folder_with_another_run_is_refused_and_untouched(config, copied, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = replace(config, phases=replace(config.phases, weight_decay=0.5))
    with pytest.raises(RunError, match=r"phases\.weight_decay is 0\.3, here 0\.5\. Nothing was overwritten"):
        fit(other, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_folder_with_other_files_is_refused(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="not empty and holds no run"):
        fit(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_not_finite_stops_before_its_step_and_keeps_what_was_good(
    config, tmp_path, monkeypatch
):
    honest = AliasTask.recipe

    def poisoned(self):
        recipe = honest(self)
        calls = iter(range(10**6))
        return replace(
            recipe,
            loss=lambda m, b: recipe.loss(m, b) * (float("nan") if next(calls) == 7 else 1.0),
        )

    monkeypatch.setattr(AliasTask, "recipe", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"nan at step 7.*learning_rate"):
        fit(config, tmp_path / "run")
    kept = Trajectory.open(tmp_path / "run")
    assert kept.verify() == []
    assert kept.steps[-1] <= 7
    assert all(torch.isfinite(tensor).all() for tensor in kept.last.parameters.values())


@pytest.mark.slow
def test_the_callers_random_numbers_and_settings_are_not_touched(config, tmp_path):
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 - the global generator is what must not move
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(config, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_two_runs_of_one_config_are_the_same_whatever_the_callers_random_numbers(config, tmp_path):
    torch.manual_seed(1)
    one = fit(config, tmp_path / "one")
    torch.manual_seed(2)
    assert_same(fit(config, tmp_path / "two"), one)


@pytest.mark.slow
def test_pretraining_stops_once_the_heldout_loss_is_low_enough(config, tmp_path):
    # Every loss is below 100 nats, so pretraining stops after the first evaluated step.
    config = replace(config, phases=replace(config.phases, stop_pretrain_at=100.0))
    run = fit(config, tmp_path / "run")
    assert StudyConfig.from_dict(run.config).phases.pretrain == PhaseConfig(1, warmup=3)
    assert run.optimizer_starts == (0, 1)
    assert [v for v in studies.verify(run) if v.differences] == []
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["phases"]["pretrain"]["steps"] == 1
    assert_same(fit(config, tmp_path / "run"), run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", "float32"), ("32-true", "float64"), ("32-true", "bfloat16")]
)
def test_a_run_in_another_precision_replays_bit_for_bit_too(config, tmp_path, precision, dtype):
    config = replace(
        config,
        trainer=replace(config.trainer, precision=precision),
        model=replace(config.model, dtype=dtype),
    )
    run = fit(config, tmp_path / "run")
    assert [v for v in studies.verify(run) if v.differences] == []
    assert {str(p.dtype) for p in run.last.parameters.values()} == {f"torch.{dtype}"}


@pytest.mark.slow
def test_x2_forked_from_another_run_starts_at_its_state_and_exchanges_the_roles(config, run, tmp_path):
    start = run.at(config.phases.starts["x2"])
    exchanged = replace(config, task=replace(config.task, x2_roles="exchanged"))
    fork = fit(exchanged, tmp_path / "fork", start=start)
    assert fork.steps[0] == start.step
    assert fork.at(start.step).differences(start) == []
    assert fork.last.differences(run.last) != []
    assert [v for v in studies.verify(fork) if v.differences] == []


def test_metrics_hold_accuracy_and_loss_of_every_set_at_every_evaluated_step(config, run):
    metrics = pd.read_csv(run.path / "metrics.csv").set_index("step")
    names = {f"{s}_{q}" for s in ("DtQ1", "DfQ2", "Dt3", "Df4", "heldout") for q in ("accuracy", "loss")}
    assert names <= set(metrics.columns)
    assert set(run.steps) | set(range(0, 30, 4)) == set(metrics.index)
    assert metrics[sorted(names)].notna().all().all()
    # By another road: accuracy by hand from the stored weights.
    task, step = AliasTask(config), run.steps[7]
    model = task.model()
    run.at(step).restore(model)
    batch = task.evaluation["Dt3"]
    guesses = model(batch.tokens)[:, 2].argmax(-1)
    assert metrics.loc[step, "Dt3_accuracy"] == pytest.approx(
        (guesses == batch.targets).double().mean().item()
    )
