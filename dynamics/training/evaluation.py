"""Watching a run: accuracy and loss on fixed batches, by torchmetrics, into Lightning's logger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from dynamics.batch import Batch
from dynamics.measures import target_logits
from dynamics.models.functional import eval_mode


def scores(model: nn.Module, batches: Mapping[str, Batch], d_vocab: int) -> dict[str, float]:
    """Accuracy (share of rows) and loss (nats) of each batch, as `NAME_accuracy` and `NAME_loss`."""
    device = next(model.parameters()).device
    found: dict[str, float] = {}
    with torch.no_grad(), eval_mode(model):
        for name, batch in batches.items():
            here = batch.to(device)
            logits = target_logits(model, here)
            accuracy = multiclass_accuracy(logits, here.targets, d_vocab, average="micro")
            found[f"{name}_accuracy"] = accuracy.item()
            found[f"{name}_loss"] = F.cross_entropy(logits, here.targets).item()
    return found


class Evaluation(Callback):
    """Logs the scores before each of the given steps, beside the loss of that step's own batch.

    Args:
        batches: what is evaluated, by name.
        steps: before which steps.
        start: the number of the Trainer's first step.
        model: evaluated in eval mode.
        d_vocab: number of tokens.
        stop_below: ends training once the loss on `heldout` is below it.
    """

    def __init__(
        self,
        batches: Mapping[str, Batch],
        steps: Iterable[int],
        start: int,
        model: nn.Module,
        d_vocab: int,
        stop_below: float | None = None,
    ) -> None:
        self.batches = batches
        self.steps = frozenset(steps)
        self.start = start
        self.model = model
        self.d_vocab = d_vocab
        self.stop_below = stop_below
        self._pending: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Score the state before this step."""
        step = self.start + trainer.global_step
        if step in self.steps:
            self._pending = scores(self.model, self.batches, self.d_vocab)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the scores of the state before the step just taken."""
        if self._pending:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            logged = {**self._pending, "train_loss": outputs["loss"].item(), "learning_rate": rate}
            self._log(trainer, logged, self.start + trainer.global_step - 1)
            if self.stop_below is not None and self._pending["heldout_loss"] < self.stop_below:
                trainer.should_stop = True
            self._pending = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores training ends with."""
        self._log(trainer, scores(self.model, self.batches, self.d_vocab), self.start + trainer.global_step)

    def _log(self, trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            logger.save()


def collect(logs: Path) -> pd.DataFrame:
    """Join the CSV logs of a run's fits, `logs/FIT/metrics.csv`, into one table by step.

    Where two fits logged the same step, as after an interruption, the later row of the later fit stands.
    """
    tables = [pd.read_csv(path) for path in sorted(logs.glob("*/metrics.csv"))]
    if not tables:
        return pd.DataFrame({"step": []})
    return pd.concat(tables).groupby("step", as_index=False).last()
