"""Train a run of a task: its phases one after another, each from a checkpoint, resumable at any of them."""

from __future__ import annotations

import logging
import os
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

from checkpoints import Checkpoint, Trajectory, TrajectoryWriter, schedule, store
from dynamics.config import RunConfig
from dynamics.recipe import ByNorm
from dynamics.tasks import Task, load
from dynamics.training.evaluation import Evaluation, collect
from dynamics.training.module import StepModule
from dynamics.training.recorder import TrajectoryRecorder

_SETTINGS = ("accelerator", "logger", "threads")
"""Of the trainer's config: what does not define a run."""


class RunError(RuntimeError):
    """The output folder holds something else; nothing was overwritten."""


def fit(config: RunConfig, out: str | os.PathLike[str], start: Checkpoint | None = None) -> Trajectory:
    """Train the run of a config into a folder, or go on where it stopped.

    Args:
        config: what is trained.
        out: the run's folder. Empty, absent, or without a checkpoint since its start failed: a new run. Holding an
            unfinished run of the same config: that run goes on from its last checkpoint, with the same result as
            if it had never stopped. Accelerator, logger and threads may be others than before.
        start: a checkpoint of another run to begin from, such as its X2 start; None begins anew.

    Returns:
        The finished trajectory.

    Raises:
        RunError: the folder holds a run of another config, or files that are no run.
        NonFiniteLoss: the loss became NaN or infinite.
        KeyboardInterrupt: as the user asked; the same call resumes.
    """
    out = Path(out)
    with _writer(config, out) as writer:
        task = load({**writer.config, "trainer": config.to_dict()["trainer"]})
        if not writer.steps:
            writer.append(_entering(task, start or _beginning(task)))
        while (state := Trajectory.open(out).last).step < task.config.phases.starts["end"]:
            if task.config.to_dict()["trainer"] != writer.config["trainer"]:
                _keep(task.config, writer)
            phase, _ = task.config.phases.locate(state.step)
            reached = _fit_phase(task, writer, state, phase)
            if reached.step < _stop(task.config, phase):
                _keep(_stopped_early(task.config, phase, reached.step), writer)
                task = load(writer.config)
            writer.append(_entering(task, reached))
    return Trajectory.open(out)


def kept_steps(config: RunConfig) -> tuple[int, ...]:
    """The steps whose checkpoints are stored.

    In every phase log-spaced from its start; the last phase's first ones and those a study replays; the end.
    """
    starts = config.phases.starts
    kept = [
        schedule.log_spaced(_stop(config, name), config.schedule.per_decade, starts[name])
        for name in config.phases.by_name
    ]
    last = list(config.phases.by_name)[-1]
    first = schedule.window(starts[last], min(starts[last] + config.schedule.dense, _stop(config, last)))
    return schedule.union(*kept, first, config.replayed, [starts["end"]])


def evaluated_steps(config: RunConfig) -> tuple[int, ...]:
    """The steps before which the run is scored."""
    return schedule.union(
        kept_steps(config), schedule.every(config.schedule.evaluate_every, config.phases.starts["end"])
    )


def _stop(config: RunConfig, phase: str) -> int:
    """The step after a phase's last."""
    return config.phases.starts[phase] + config.phases.by_name[phase].steps


def _writer(config: RunConfig, out: Path) -> TrajectoryWriter:
    """Create the run, or resume it if it was asked for with the same config."""
    if not (out / store.MANIFEST).exists():
        if out.exists() and {path.name for path in out.iterdir()} - {store.LOCK, store.TRAJECTORY}:
            raise RunError(f"{out} is not empty and holds no run. Give --out a new folder.")
    elif (there := Trajectory.open(out)).steps:
        found, asked = _defining(there.provenance.get("requested") or {}), _defining(config.to_dict())
        if found != asked:
            raise RunError(
                f"{out} holds another run: {_difference(found, asked)}. "
                "Nothing was overwritten. Give --out a new folder, or the config of that run to continue it."
            )
        return TrajectoryWriter.resume(out)
    writer = TrajectoryWriter.create(out, config.to_dict(), {"requested": config.to_dict()})
    _write_yaml(config, writer)
    return writer


def _defining(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what says only where and how comfortably a run is trained."""
    trainer = {key: value for key, value in config.get("trainer", {}).items() if key not in _SETTINGS}
    return {**config, "trainer": trainer}


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


def _keep(config: RunConfig, writer: TrajectoryWriter) -> None:
    """Store a config as the run's, with its trajectory and beside it."""
    writer.configure(config.to_dict())
    _write_yaml(config, writer)


def _write_yaml(config: RunConfig, writer: TrajectoryWriter) -> None:
    writer.write_file("config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False).encode())


def _beginning(task: Task) -> Checkpoint:
    """The new model at step 0, with the study's random numbers."""
    recipe = task.recipe()
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    scheduler = recipe.build_scheduler(optimizer)
    with torch.random.fork_rng():
        torch.manual_seed(task.config.seed)
        return Checkpoint.capture(recipe.model, optimizer, scheduler, 0)


def _entering(task: Task, state: Checkpoint) -> Checkpoint:
    """The state as the next step finds it: where a phase begins a new optimizer, without the old moments."""
    phases = task.config.phases
    if state.step not in phases.optimizer_starts:
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


def _fit_phase(task: Task, writer: TrajectoryWriter, state: Checkpoint, phase: str) -> Checkpoint:
    """Train from a stored state to the end of its phase, and return the state reached there."""
    config, recipe = task.config, task.recipe()
    stop = _stop(config, phase)
    module = StepModule(recipe, state)
    evaluation = Evaluation(
        task.evaluation,
        [step for step in evaluated_steps(config) if step < stop],
        state.step,
        recipe.model,
        task.d_vocab,
        stop_below=config.phases.stop_below(phase),
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
        if len(metrics := collect(writer.path / "logs")):
            writer.write_file("metrics.csv", metrics.to_csv(index=False).encode())


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

    def __init__(self, task: Task, start: int, stop: int) -> None:
        self.task, self.start, self.stop = task, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Any]:
        return (self.task.batch(step) for step in range(self.start, self.stop))


def _stopped_early(config: RunConfig, phase: str, reached: int) -> RunConfig:
    """The config with a phase as long as it was."""
    return replace(config, phases=config.phases.shortened(phase, reached - config.phases.starts[phase]))


def _logger(config: RunConfig, out: Path, step: int) -> list[Logger]:
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
