"""What is compared between checkpoints of the alias task: questions, definitions as trained, roles of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynamics.batch import Batch, concatenate
from dynamics.recipe import Contrast
from dynamics.tasks.aliases import SETS, AliasTask, SetName

ORDERS = ("alias first", "operand first")
"""The two ways to ask: `A d =` and `d A =`."""


def alias_questions(
    task: AliasTask, sets: Sequence[SetName] = SETS
) -> tuple[dict[str, Batch], dict[str, list[Any]]]:
    """Every alias's questions that are never trained, both orders: batches by label, and coordinates.

    The coordinates are those of `AliasTask.contrasts`: `integer` and `set`. Sets whose questions are all trained
    have none to ask and are left out.
    """
    asked = [(i, name) for name in sets for i in task.sets[name] if task.test_multipliers(i)]
    batches = {f"alias {i}": replace(task.questions(i), example_ids=None) for i, _ in asked}
    return batches, {"integer": [i for i, _ in asked], "set": [name for _, name in asked]}


def in_order(task: AliasTask, questions: Batch, order: str) -> Batch:
    """The questions that are asked in one of the two `ORDERS`."""
    if order not in ORDERS:
        raise ValueError(f"no order {order!r}; there are {', '.join(ORDERS)}.")
    first = _is_alias(task, questions.tokens[:, 0])
    return questions[first if order == "alias first" else ~first]


def as_trained(task: AliasTask, sets: Sequence[SetName] = SETS) -> list[Contrast]:
    """Per alias its definition as training gives it, the same under the other tag, and all its questions.

    The base has the tag and the value (false in DfQ2) that the alias is trained with, the source the other tag; the
    probe asks every multiplier, trained or not, so that all sets are asked alike. Coordinates as
    `AliasTask.contrasts`.
    """
    return [
        Contrast(
            base=definition,
            source=replace(definition, tokens=_other_tag(task, definition.tokens)),
            probe=task.questions(i, task.config.task.multipliers),
            coords={"example": f"alias {i}", "integer": i, "set": name},
        )
        for name in sets
        for i in task.sets[name]
        for definition in [task.trained_definition(i)]
    ]


def head_roles(task: AliasTask) -> dict[str, tuple[Batch, Tensor]]:
    """Where a head may look from the scored position, for `dynamics.comparison.head_roles`.

    "previous token" on held-out table rows `x y =`; "to alias" on all aliases' questions, in both orders; "to tag"
    on their definitions, where the tag is the token before the alias as well.
    """
    batches, _ = alias_questions(task)
    questions = concatenate(list(batches.values()))
    definitions = concatenate([task.trained_definition(i) for name in SETS for i in task.sets[name]])
    roles = {
        "to alias": (questions, (~_is_alias(task, questions.tokens[:, 0])).long()),
        "to tag": (definitions, torch.zeros(len(definitions), dtype=torch.int64)),
    }
    if table := task.evaluation.get("heldout"):
        roles["previous token"] = (table, table.target_pos - 1)
    return roles


def _other_tag(task: AliasTask, tokens: Tensor) -> Tensor:
    exchanged = tokens.clone()
    exchanged[:, 0] = task.reliable + task.unreliable - tokens[:, 0]
    return exchanged


def _is_alias(task: AliasTask, tokens: Tensor) -> Tensor:
    return (tokens >= task.modulus) & (tokens < 2 * task.modulus)
