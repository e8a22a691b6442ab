"""Batch: what a loss or a measure of a language model eats, one row per scored position."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from dynamics.trees import described


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens, the position scored in each, and the token that should follow it.

    Attributes:
        tokens: [batch, pos] token ids.
        target_pos: [batch] position whose next token is predicted.
        targets: [batch] that next token.
        distractors: [batch, n] wrong answers to compare with, for `logit_difference`.
        example_ids: [batch] which example a row belongs to (an acronym has three rows).
        attention_mask: [batch, pos] 1 for a token and 0 for padding, left or right, where rows differ in length.
            Hugging Face's models and bridges to them take it. `target_pos` counts padding as well.
    """

    tokens: Tensor
    target_pos: Tensor
    targets: Tensor
    distractors: Tensor | None = None
    example_ids: Tensor | None = None
    attention_mask: Tensor | None = None

    def __repr__(self) -> str:
        return described(self)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> Batch:
        """Rows by slice or index tensor; the result is again a Batch."""
        if isinstance(rows, int):
            raise TypeError(f"batch[{rows}] would lose the batch axis; take batch[{rows}:{rows + 1}].")
        return self._map(lambda t: t[rows])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda t: t.to(device))

    def _map(self, change: Any) -> Batch:
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return Batch(**{name: change(value) for name, value in present.items()})


def output_of(model: Any, batch: Batch) -> Any:
    """What a model gives for a batch: `model(tokens)`, or with padding `model(tokens, attention_mask=...)`.

    Position ids count from each row's first token; models that count from the mask themselves are not given any.
    """
    mask = batch.attention_mask
    if mask is None:
        return model(batch.tokens)
    extra = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        extra["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return model(batch.tokens, attention_mask=mask, **extra)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch with the rows of all; optional fields must be present in all or in none."""
    columns = []
    for f in fields(Batch):
        values = [getattr(b, f.name) for b in batches]
        present = [v for v in values if v is not None]
        if present and len(present) != len(values):
            raise ValueError(f"only some of the batches have {f.name}; give it to all or to none.")
        columns.append(torch.cat(present) if present else None)
    return Batch(*columns)  # type: ignore[arg-type]


def _flatten(batch: Batch) -> tuple[list[Tensor], tuple[str, ...]]:
    names = tuple(f.name for f in fields(Batch) if getattr(batch, f.name) is not None)
    return [getattr(batch, name) for name in names], names


_pytree.register_pytree_node(
    Batch,
    _flatten,
    lambda values, names: Batch(**dict(zip(names, values, strict=True))),
    serialized_type_name="dynamics.batch.Batch",
)
