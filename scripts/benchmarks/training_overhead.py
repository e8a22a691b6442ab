"""What Lightning, Hugging Face's Trainer and their recorders cost. About 10 minutes on one core.

Three ways take the same steps of the same toy, interleaved, so that a busy machine disturbs all alike: a
bare loop; Lightning with `StepModule`; Lightning with a `TrajectoryRecorder` on the default schedule. The
ratios of the medians go into the documentation. TransformerLens's own model stands beside the toy. Hugging Face's
Trainer trains a small Llama without and with every step recorded, beside as many checkpoints written alone.

    .venv/bin/python scripts/benchmarks/training_overhead.py --readme
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from lightning.pytorch import Trainer
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import boot as boot_native

import dynamics as dy
from checkpoints import Checkpoint, TrajectoryWriter
from checkpoints.rng import replayed
from dynamics.config import StudyConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.into_readme import conclude, stamp

HUGGING_FACE_STEPS = 100
NATIVE_STEPS = 300
"""Steps that TransformerLens's own model is trained for, beside as many of the toy."""


def bare(task: dy.tasks.AliasTask, first: int, steps: int, model: nn.Module | None = None) -> None:
    """The loop anyone would write; with the toy unless another model is given."""
    recipe = task.recipe()
    model = model or recipe.model
    optimizer = recipe.optimizer(model.parameters())
    scheduler = recipe.scheduler(optimizer)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        recipe.loss(model, task.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip.max_norm)
        optimizer.step()
        scheduler.step()


def by_trainer(task: dy.tasks.AliasTask, first: int, steps: int, callbacks: list[object]) -> None:
    """The same steps by Lightning, set as `dynamics fit` sets it."""
    recipe = task.recipe()
    optimizer = recipe.optimizer(recipe.model.parameters())
    start = Checkpoint.capture(recipe.model, optimizer, recipe.scheduler(optimizer), first)
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=1,
        gradient_clip_val=recipe.clip.max_norm,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        deterministic=True,
    ).fit(dy.training.StepModule(recipe, start), Batches(task, first, steps))
    torch.use_deterministic_algorithms(False)


class Batches:
    """A plain iterable of the task's batches, so that no sampler costs anything."""

    def __init__(self, task: dy.tasks.AliasTask, first: int, steps: int) -> None:
        self.task, self.first, self.steps = task, first, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        return (self.task.batch(step) for step in range(self.first, self.first + self.steps))


def recorded(task: dy.tasks.AliasTask, first: int, steps: int) -> None:
    """The same by Lightning, with checkpoints stored on the default schedule."""
    with tempfile.TemporaryDirectory() as folder, TrajectoryWriter.create(Path(folder) / "run", {}) as writer:
        recorder = dy.training.TrajectoryRecorder(writer, dy.training.kept_steps(task.config), first)
        by_trainer(task, first, steps, [recorder])


def native(task: dy.tasks.AliasTask) -> nn.Module:
    """TransformerLens's own transformer in the toy's shape, behind its bridge."""
    given = task.config.model
    shapes = {
        name: getattr(given, name) for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx")
    }
    d_vocab = task.recipe().model.cfg.d_vocab
    return boot_native(
        TransformerBridgeConfig(**shapes, d_vocab=d_vocab, act_fn="relu", normalization_type="LN", seed=0)
    )


def llama() -> nn.Module:
    """A Llama of 0.2 million parameters, drawn from seed 0."""
    with replayed(None):
        torch.manual_seed(0)
        shape = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **shape))


def by_hugging_face(folder: Path, callbacks: list[object], model: nn.Module, steps: int) -> None:
    """Steps of the Trainer with its defaults: AdamW in two groups, clipping, a linear schedule."""
    rows = torch.randint(128, (8 * steps, 16), generator=torch.Generator().manual_seed(0))
    given = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(model, given, train_dataset=dataset, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def recording(steps: int = HUGGING_FACE_STEPS) -> dict[str, float]:
    """Seconds of the Trainer without and with every step recorded, and of as many checkpoints written alone."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["plain"] = timed(by_hugging_face, folder, [], llama(), steps)
        with TrajectoryWriter.create(folder / "run", {}) as writer:
            recorder = dy.training.HuggingFaceRecorder(writer, range(steps + 1))
            found["recorded"] = timed(by_hugging_face, folder, [recorder], llama(), steps)
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        with TrajectoryWriter.create(folder / "alone", {}) as writer:
            start = time.perf_counter()
            for step in range(steps + 1):
                writer.append(Checkpoint.capture(model, optimizer, step=step))
            found["written"] = time.perf_counter() - start
    return found


def timed(function: Callable[..., None], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(repeats: int, threads: int) -> dict[str, float]:
    """Median seconds of a whole X1 phase each way, and the two ratios."""
    torch.set_num_threads(threads)
    config = StudyConfig()
    task = dy.tasks.AliasTask(config)
    first, steps = config.phases.starts["x1"], config.phases.x1.steps
    ways: dict[str, Callable[[], float]] = {
        "bare": lambda: timed(bare, task, first, steps),
        "trainer": lambda: timed(by_trainer, task, first, steps, []),
        "recorded": lambda: timed(recorded, task, first, steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        # Turn the order round every time, so that warming up or slowing down favours none.
        for name in (list(ways), list(ways)[::-1])[repeat % 2]:
            seconds[name].append(ways[name]())
    beside = [
        (timed(bare, task, first, NATIVE_STEPS, native(task)), timed(bare, task, first, NATIVE_STEPS))
        for _ in range(repeats)
    ]
    theirs = [recording() for _ in range(repeats)]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "steps": steps,
        "repeats": repeats,
        "threads": threads,
        "bare_ms": 1e3 * medians["bare"] / steps,
        "trainer_ms": 1e3 * medians["trainer"] / steps,
        "recorded_ms": 1e3 * medians["recorded"] / steps,
        "native_ms": 1e3 * statistics.median(theirs for theirs, _ in beside) / NATIVE_STEPS,
        **{
            f"hugging_face_{name}_ms": 1e3
            * statistics.median(one[name] for one in theirs)
            / HUGGING_FACE_STEPS
            for name in theirs[0]
        },
        "recording_over_written": statistics.median(
            (one["recorded"] - one["plain"]) / one["written"] for one in theirs
        ),
        "native_over_bare": statistics.median(theirs / ours for theirs, ours in beside),
        "trainer_over_bare": statistics.median(
            t / b for t, b in zip(seconds["trainer"], seconds["bare"], strict=True)
        ),
        "recorded_over_trainer": statistics.median(
            r / t for r, t in zip(seconds["recorded"], seconds["trainer"], strict=True)
        ),
    }


def table(found: dict[str, float]) -> str:
    return "\n".join(
        [
            "| | ms a step | ratio | goal |",
            "|---|---|---|---|",
            f"| bare loop | {found['bare_ms']:.2f} | 1 | |",
            f"| Lightning's Trainer | {found['trainer_ms']:.2f} | {found['trainer_over_bare']:.3f} of the bare "
            "loop | at most 1.10 |",
            f"| with the trajectory recorded | {found['recorded_ms']:.2f} | {found['recorded_over_trainer']:.3f} "
            "of the Trainer | at most 1.15 |",
            f"| TransformerLens's native bridge, bare loop | {found['native_ms']:.2f} | "
            f"{found['native_over_bare']:.3f} of the bare loop | |",
            f"| Hugging Face's Trainer, small Llama | {found['hugging_face_plain_ms']:.2f} | 1 | |",
            f"| with every step recorded | {found['hugging_face_recorded_ms']:.2f} | what it adds: "
            f"{found['recording_over_written']:.2f} of these checkpoints written alone | 1 |",
            f"| these checkpoints written alone | {found['hugging_face_written_ms']:.2f} | | |",
            "",
            f"Default toy (but for the last three lines), all {found['steps']} steps of X1, default schedule; "
            f"medians of {found['repeats']} interleaved repeats. {found['threads']} thread. {stamp(__file__)}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("runs/training-overhead.json"))
    given = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    found = measure(given.repeats, given.threads)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1))
    conclude(given, "overhead", table(found))


if __name__ == "__main__":
    main()
