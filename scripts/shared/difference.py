"""What scripts ask of an alias study: how much better Dt3's questions are answered than Df4's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dynamics.batch import Batch, concatenate
from dynamics.measures import LogitMeasure
from dynamics.tasks import AliasTask


def asked_by_set(task: AliasTask) -> dict[str, Batch]:
    """The untrained questions of Dt3 and of Df4, up to the position that is scored."""
    return {name: _read(task.evaluation[name]) for name in ("Dt3", "Df4")}


def difference(task: AliasTask) -> tuple[LogitMeasure, Batch]:
    """D = mean correct logit of Dt3 less that of Df4, as the mean over the rows of one batch, and that batch."""
    parts = list(asked_by_set(task).values())
    n = sum(map(len, parts))
    weight = torch.cat(
        [torch.full((len(p),), sign * n / len(p)) for p, sign in zip(parts, (1, -1), strict=True)]
    )

    def from_logits(logits: Tensor, batch: Batch) -> Tensor:
        return logits.gather(-1, batch.targets[:, None]).squeeze(-1) * weight

    return LogitMeasure("Dt3 − Df4", "logit", from_logits), concatenate(parts)


def _read(batch: Batch) -> Batch:
    return replace(batch, tokens=batch.tokens[:, : int(batch.target_pos.max()) + 1])
