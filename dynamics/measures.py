"""Measures of behaviour: functions (model, batch) -> Tensor, one value per scored row.

Those here all read the logits at each row's scored position, so a verb asked for several of them
takes the forward pass once (`from_logits`). Any other function of (model, batch) is a measure too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamics.batch import Batch, output_of
from dynamics.config.checks import did_you_mean

Measure = Callable[[Any, Any], Tensor]


class MeasureError(ValueError):
    """A measure gave something else than numbers; the message names it and says what it gave."""


@dataclass(frozen=True)
class LogitMeasure:
    """A measure that needs only the logits at the scored positions.

    Attributes:
        name: as it appears in results.
        units: of its values.
        from_logits: (logits [rows, vocab], batch) -> [rows].
        __doc__: what it measures.
    """

    name: str
    units: str
    from_logits: Callable[[Tensor, Batch], Tensor]

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.from_logits(target_logits(model, batch), batch)


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits that predict each row's target: [rows, vocab]. Reads `.logits` of Hugging Face outputs."""
    return at_target_pos(output_of(model, batch), batch)


def at_target_pos(output: Any, batch: Batch) -> Tensor:
    """What a model gave, [rows, pos, vocab], at each row's scored position: [rows, vocab]."""
    logits: Tensor = getattr(output, "logits", output)
    return logits[torch.arange(len(batch), device=logits.device), batch.target_pos]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Training loss: mean −log p(target) over the rows, in nats; a scalar."""
    return F.cross_entropy(target_logits(model, batch), batch.targets)


def cross_entropy_in_bf16(model: nn.Module, batch: Batch) -> Tensor:
    """The same loss with the forward pass under autocast, as Lightning's `bf16-mixed` takes it."""
    with torch.autocast(batch.tokens.device.type, torch.bfloat16):
        return cross_entropy(model, batch)


def _at_target(logits: Tensor, batch: Batch) -> Tensor:
    return logits.gather(-1, batch.targets[:, None]).squeeze(-1)


def _at_distractors(logits: Tensor, batch: Batch, measure: str) -> Tensor:
    if batch.distractors is None:
        raise ValueError(f"{measure} needs batch.distractors [rows, n]: the wrong answers to compare with.")
    return logits.gather(-1, batch.distractors)


def _difference(logits: Tensor, batch: Batch) -> Tensor:
    return _at_target(logits, batch) - _at_distractors(logits, batch, "logit_difference").mean(-1)


def _margin(logits: Tensor, batch: Batch) -> Tensor:
    return _at_target(logits, batch) - _at_distractors(logits, batch, "logit_margin").amax(-1)


correct_logit = LogitMeasure("correct_logit", "logit", _at_target)
"""Logit of the correct answer (the seed's metric)."""

centred_logit = LogitMeasure("centred_logit", "logit", lambda z, b: _at_target(z, b) - z.mean(-1))
"""Logit of the correct answer less the mean logit: unmoved by a shift of all logits."""

correct_log_prob = LogitMeasure("correct_log_prob", "nat", lambda z, b: _at_target(z.log_softmax(-1), b))
"""Log probability of the correct answer, in nats."""

probability = LogitMeasure("probability", "probability", lambda z, b: _at_target(z.softmax(-1), b))
"""Probability of the correct answer."""

accuracy = LogitMeasure("accuracy", "share", lambda z, b: (z.argmax(-1) == b.targets).to(z.dtype))
"""Whether the correct answer has the largest logit."""

logit_difference = LogitMeasure("logit_difference", "logit", _difference)
"""Logit of the correct answer less the mean logit of the batch's distractors."""

logit_margin = LogitMeasure("logit_margin", "logit", _margin)
"""Logit of the correct answer less the largest logit of the batch's distractors."""


def probabilities(tokens: Mapping[str, int]) -> dict[str, LogitMeasure]:
    """One measure for each chosen token: its probability at the scored position, whatever the batch's targets.

    Args:
        tokens: name -> token id, such as {"Madrid": 14708, "Rome": 10598}; the names become the dim `measure`.
    """
    return {
        name: LogitMeasure(name, "probability", lambda z, b, token=token: z.softmax(-1)[:, token])  # type: ignore[misc]
        for name, token in tokens.items()
    }


def named(measure: Measure | Mapping[str, Measure]) -> dict[str, Measure]:
    """One or several measures as a dict by name."""
    if isinstance(measure, Mapping):
        return dict(measure)
    return {str(getattr(measure, "name", getattr(measure, "__name__", "measure"))): measure}


def by_name(name: str) -> LogitMeasure:
    """The measure of this module with that name; an error lists the names."""
    known = {m.name: m for m in globals().values() if isinstance(m, LogitMeasure)}
    if name not in known:
        raise ValueError(
            f"no measure {name!r}; there are {', '.join(sorted(known))}.{did_you_mean(name, known)}"
        )
    return known[name]


def evaluate(measures: Mapping[str, Measure], model: nn.Module, batch: Any) -> Tensor:
    """Each measure on one batch, averaged over its rows in fp64: [n_measures].

    Measures of the logits share one forward pass.

    Raises:
        MeasureError: a measure gives neither a number nor one number for each row.
    """
    return torch.stack([_mean(values) for values in per_row(measures, model, batch).values()])


def per_row(measures: Mapping[str, Measure], model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What each measure gives on one batch, before rows are averaged: [rows], or a scalar.

    Raises:
        MeasureError: as `evaluate`.
    """
    if any(isinstance(m, LogitMeasure) for m in measures.values()):
        logits = target_logits(model, batch)
    return {
        name: one_for_each_row(
            name, m.from_logits(logits, batch) if isinstance(m, LogitMeasure) else m(model, batch)
        )
        for name, m in measures.items()
    }


def one_for_each_row(name: str, values: Any) -> Tensor:
    """What a measure gave, as a tensor [rows] or a scalar.

    Raises:
        MeasureError: it is something else, such as None, a list, [rows, k], or no rows at all.
    """
    if not isinstance(values, Tensor | int | float | np.ndarray | np.generic):
        raise MeasureError(f"measure {name!r} gave {_article(values)}; {_EXPECTED}")
    found = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    if found.ndim > 1 or not found.numel():
        raise MeasureError(f"measure {name!r} gave a tensor of shape {tuple(found.shape)}; {_EXPECTED}")
    return found


def refuse_all_nan(measures: Mapping[str, Measure], model: nn.Module, batch: Any) -> None:
    """Raise a MeasureError where a measure is NaN for every row of a batch."""
    for name, values in per_row(measures, model, batch).items():
        if bool(values.isnan().all()):
            n = f"all {values.numel()} rows" if values.ndim else "the batch"
            raise MeasureError(f"measure {name!r} gave NaN for {n}; {_EXPECTED}")


_EXPECTED = "expected one number for each row of the batch, or a single one: a tensor of shape [rows] or []."


def _article(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _mean(values: Tensor) -> Tensor:
    """Mean over the rows in fp64; correct or not counts as 1 or 0."""
    return values.to(torch.float64).mean()
