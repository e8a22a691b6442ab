"""Train a study's run: its phases one after another, each from a checkpoint, resumable at any of them."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from tqdm.auto import tqdm

from checkpoints import Checkpoint, Trajectory, TrajectoryWriter, schedule
from dynamics.config import PhaseConfig, StudyConfig
from dynamics.recipe import ByNorm
from dynamics.tasks import AliasTask
from dynamics.training.evaluation import Evaluation, collect
from dynamics.training.module import StepModule
from dynamics.training.recorder import TrajectoryRecorder

NEW_OPTIMIZER = ("pretrain", "x1")
"""The phases that begin with a new optimizer; X2 goes on with X1's."""


class RunError(RuntimeError):
    """The output folder holds something else; nothing was overwritten."""


def fit(config: StudyConfig, out: Path, start: Checkpoint | None = None) -> Trajectory:
    """Train the run of a config into a folder, or go on where it stopped.

    Args:
        config: what is trained.
        out: the run's folder. Empty or absent: a new run. Holding an unfinished run of the same config: that
            run goes on from its last checkpoint, with the same result as if it had never stopped.
        start: a checkpoint of another run to begin from, such as its X2 start; None begins anew.

    Returns:
        The finished trajectory.

    Raises:
        RunError: the folder holds a run of another config, or files that are no run.
        NonFiniteLoss: the loss became NaN or infinite.
        KeyboardInterrupt: as the user asked; the same call resumes.
    """
    with _writer(config, out) as writer:
        config = StudyConfig.from_dict(writer.config)
        task = AliasTask(config)
        if not writer.steps:
            writer.append(_entering(task, start or _beginning(task)))
        while (state := Trajectory.open(out).last).step < config.phases.starts["end"]:
            phase, _ = config.phases.locate(state.step)
            reached = _fit_phase(task, writer, state, phase)
            if phase == "pretrain" and reached.step < config.phases.starts["x1"]:
                config = _stopped_early(config, reached.step)
                writer.configure(config.to_dict())
                _write_yaml(config, out)
                task = AliasTask(config)
            writer.append(_entering(task, reached))
    return Trajectory.open(out)


def kept_steps(config: StudyConfig) -> tuple[int, ...]:
    """The steps whose checkpoints are stored.

    In every phase log-spaced from its start; X2's first ones and those it is replayed from; the end.
    """
    starts, phases = config.phases.starts, config.phases
    kept = [
        schedule.log_spaced(starts[name] + phase.steps, config.schedule.per_decade, starts[name])
        for name, phase in _phases(config).items()
    ]
    dense = min(config.schedule.dense, phases.x2.steps)
    first = schedule.window(starts["x2"], starts["x2"] + dense)
    replayed = [starts["x2"] + step for step in config.patching.x2_steps]
    return schedule.union(*kept, first, replayed, [starts["end"]])


def evaluated_steps(config: StudyConfig) -> tuple[int, ...]:
    """The steps before which the run is scored."""
    return schedule.union(
        kept_steps(config), schedule.every(config.schedule.evaluate_every, config.phases.starts["end"])
    )


def _phases(config: StudyConfig) -> dict[str, PhaseConfig]:
    return {"pretrain": config.phases.pretrain, "x1": config.phases.x1, "x2": config.phases.x2}


def _writer(config: StudyConfig, out: Path) -> TrajectoryWriter:
    """Create the run, or resume it if it was asked for with the same config."""
    if not (out / "manifest.json").exists():
        if out.exists() and any(out.iterdir()):
            raise RunError(f"{out} is not empty and holds no run. Give --out a new folder.")
        provenance = {"requested": config.to_dict()}
        writer = TrajectoryWriter.create(out, config.to_dict(), provenance)
        _write_yaml(config, out)
        return writer
    requested = Trajectory.open(out).provenance.get("requested")
    if requested != config.to_dict():
        raise RunError(
            f"{out} holds another run: {_difference(requested or {}, config.to_dict())}. "
            "Nothing was overwritten. Give --out a new folder, or the config of that run to continue it."
        )
    return TrajectoryWriter.resume(out)


def _difference(found: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> str:
    """The first key in which two configs differ, in words."""
    for key in sorted({*found, *asked}):
        ours, theirs = found.get(key), asked.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            if ours != theirs:
                return _difference(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            return f"there {prefix}{key} is {ours}, here {theirs}"
    return "its config was not recorded by this command"


def _write_yaml(config: StudyConfig, out: Path) -> None:
    (out / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def _beginning(task: AliasTask) -> Checkpoint:
    """The new model at step 0, with the study's random numbers."""
    recipe = task.recipe()
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    scheduler = recipe.build_scheduler(optimizer)
    with torch.random.fork_rng():
        torch.manual_seed(task.config.seed)
        return Checkpoint.capture(recipe.model, optimizer, scheduler, 0)


def _entering(task: AliasTask, state: Checkpoint) -> Checkpoint:
    """The state as the next step finds it: where a phase begins a new optimizer, without the old moments."""
    phases = task.config.phases
    if state.step not in (phases.starts[name] for name in NEW_OPTIMIZER):
        return state
    state = replace(state.with_fresh_optimizer(), begins_optimizer=True)
    rate = phases.learning_rate(state.step)
    assert state.optimizer is not None, "a run's checkpoints hold the optimizer"
    groups = tuple({**group, "lr": rate} for group in state.optimizer.groups)
    return replace(
        state,
        optimizer=replace(state.optimizer, groups=groups),
        scheduler={**(state.scheduler or {}), "_last_lr": [rate for _ in groups]},
    )


def _fit_phase(task: AliasTask, writer: TrajectoryWriter, state: Checkpoint, phase: str) -> Checkpoint:
    """Train from a stored state to the end of its phase, and return the state reached there."""
    config, recipe = task.config, task.recipe()
    stop = config.phases.starts[phase] + _phases(config)[phase].steps
    module = StepModule(recipe, state)
    evaluation = Evaluation(
        task.evaluation,
        [step for step in evaluated_steps(config) if step < stop],
        state.step,
        recipe.model,
        task.d_vocab,
        stop_below=config.phases.stop_pretrain_at if phase == "pretrain" else None,
    )
    kept = [step for step in kept_steps(config) if state.step < step < stop]
    recorder = _PhaseRecorder(writer, kept, state.step, recipe.model)
    assert isinstance(recipe.clip, ByNorm), "the task clips by norm"
    before = torch.get_deterministic_debug_mode()
    try:
        with state.random_state(), _interruptible(), _quiet():
            trainer = Trainer(
                accelerator=config.trainer.accelerator,
                devices=1,
                precision=config.trainer.precision,
                max_steps=stop - state.step,
                max_epochs=1,
                gradient_clip_val=recipe.clip.max_norm,
                logger=_logger(config, writer.path, state.step),
                callbacks=[evaluation, recorder, _PhaseBar(phase, stop - state.step)],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1,
                deterministic=True,
            )
            trainer.fit(module, train_dataloaders=_Batches(task, state.step, stop))
            return replace(recorder.capture(trainer, module), begins_optimizer=False)
    finally:
        torch.set_deterministic_debug_mode(before)
        collect(writer.path / "logs", writer.path / "metrics.csv")


class _PhaseRecorder(TrajectoryRecorder):
    """Leaves the phase's last state to `fit`, which stores it as the next phase begins with it."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass


class _PhaseBar(Callback):
    """A progress bar under the phase's name, on stderr as all others here: stdout is for results."""

    def __init__(self, phase: str, steps: int) -> None:
        self.bar = tqdm(total=steps, desc=phase, unit="step", mininterval=0.5)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.bar.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.bar.close()


class _Batches:
    """The task's batches from one step to another: a plain iterable, so that no random number is drawn."""

    def __init__(self, task: AliasTask, start: int, stop: int) -> None:
        self.task, self.start, self.stop = task, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Any]:
        return (self.task.batch(step) for step in range(self.start, self.stop))


def _stopped_early(config: StudyConfig, reached: int) -> StudyConfig:
    """The config with pretraining as long as it was."""
    phases = replace(config.phases, pretrain=replace(config.phases.pretrain, steps=reached))
    return replace(config, phases=phases)


def _logger(config: StudyConfig, out: Path, step: int) -> list[Logger]:
    """CSV always, since the figures read it; TensorBoard or W&B beside it where asked for."""
    loggers: list[Logger] = [CSVLogger(out, name="logs", version=f"from-{step:08d}")]
    if config.trainer.logger == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(out, name="tensorboard", version=""))
    if config.trainer.logger == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(name=out.name, save_dir=out))
    return loggers


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning turns Ctrl-C into SystemExit and leaves SIGINT ignored: give both back to the caller."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's banner, and without its warnings about what is so on purpose here."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            yield
    finally:
        log.setLevel(level)
