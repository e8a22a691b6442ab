"""What two checkpoints answer: logits, accuracy, and which predictions changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics import results
from dynamics.batch import Batch, concatenate
from dynamics.comparison.tables import Array, labelled
from dynamics.measures import target_logits
from dynamics.models.functional import call_with, eval_mode
from dynamics.recipe import Recipe
from dynamics.steps.states import starting_point

Batches = Mapping[str, Batch]
Coords = Mapping[str, Sequence[Any]]


def score(
    recipe: Recipe, checkpoint: Checkpoint | None, batches: Batches, coords: Coords | None = None
) -> xr.Dataset:
    """Accuracy, loss and correct logit of each batch: a set of questions, or one alias's.

    Args:
        recipe: its model eats tokens and gives logits; it is not changed and runs in eval mode.
        checkpoint: whose parameters; None takes the model as it stands.
        batches: by label, length n_examples.
        coords: further labels of the examples, columns of length n_examples.

    Returns:
        [example]: `accuracy` (share of rows), `loss` (mean −log p of the target, nat), `correct_logit` (mean).
    """
    state = starting_point(recipe, checkpoint)
    logits = list(_logits(recipe, state, batches).values())
    return _along_examples(
        batches,
        coords,
        {
            "accuracy": (_over(batches, logits, _right), "share of rows answered right", "share"),
            "loss": (_over(batches, logits, _loss), "mean −log p(target)", "nat"),
            "correct_logit": (_over(batches, logits, _correct), "mean logit of the target", "logit"),
        },
        results.provenance(quantity="score", step=state.step),
    )


def compare_logits(
    before: Checkpoint,
    after: Checkpoint,
    recipe: Recipe,
    batches: Batches,
    coords: Coords | None = None,
) -> xr.Dataset:
    """How the answers to each batch changed: a set of questions, or one alias's.

    Args:
        before, after: two checkpoints of the recipe's model.
        recipe, batches, coords: as `score`.

    Returns:
        [example]: `kl`, the mean over rows of KL(p_before ‖ p_after) in nats; `changed`, the share of rows whose
        largest logit moved to another token; `accuracy`, `loss` and `correct_logit` with the endings `_before`
        and `_after`, as in `score`; `rows`, how many there are.

    Source: Kullback & Leibler 1951.
    """
    both = [_logits(recipe, starting_point(recipe, c), batches) for c in (before, after)]
    pairs = list(zip(both[0].values(), both[1].values(), strict=True))
    variables: dict[str, tuple[Any, str, str]] = {
        "kl": ([float(kl_divergence(*pair).mean()) for pair in pairs], "mean KL(p_before ‖ p_after)", "nat"),
        "changed": (
            [float((a.argmax(-1) != b.argmax(-1)).double().mean()) for a, b in pairs],
            "share of rows whose prediction changed",
            "share",
        ),
        "rows": ([len(batch) for batch in batches.values()], "rows of the batch", "1"),
    }
    for name, function, units in (
        ("accuracy", _right, "share"),
        ("loss", _loss, "nat"),
        ("correct_logit", _correct, "logit"),
    ):
        for side, found in zip(("before", "after"), both, strict=True):
            values = _over(batches, list(found.values()), function)
            variables[f"{name}_{side}"] = (values, f"mean {name.replace('_', ' ')} {side}", units)
    facts = results.provenance(quantity="logits", before=before.step, after=after.step)
    return _along_examples(batches, coords, variables, facts)


def compare_rows(before: Checkpoint, after: Checkpoint, recipe: Recipe, batch: Batch) -> xr.Dataset:
    """Every row's prediction, before and after.

    Args:
        before, after, recipe: as `compare_logits`.
        batch: rows of tokens; `example_ids`, where it has them, become a coordinate.

    Returns:
        [row]: `target`, `prediction_before`, `prediction_after` (tokens), `kl` (nat), `correct_logit_before` and
        `correct_logit_after`. The label of a row is its tokens.
    """
    a, b = (_logits(recipe, starting_point(recipe, c), {"": batch})[""] for c in (before, after))
    tokens = [" ".join(map(str, row)) for row in batch.tokens.tolist()]
    coords: dict[str, Sequence[Any]] = {"row": [f"{i}: {words}" for i, words in enumerate(tokens)]}
    if batch.example_ids is not None:
        coords["example_id"] = batch.example_ids.tolist()
    variables: dict[str, tuple[Any, str, str]] = {
        "target": (batch.targets.numpy(force=True), "the right token", "token"),
        "prediction_before": (a.argmax(-1).numpy(force=True), "token of the largest logit before", "token"),
        "prediction_after": (b.argmax(-1).numpy(force=True), "token of the largest logit after", "token"),
        "kl": (kl_divergence(a, b).numpy(force=True), "KL(p_before ‖ p_after)", "nat"),
        "correct_logit_before": (_correct(a, batch).numpy(force=True), "logit of the target before", "logit"),
        "correct_logit_after": (_correct(b, batch).numpy(force=True), "logit of the target after", "logit"),
    }
    facts = results.provenance(quantity="rows", before=before.step, after=after.step)
    return labelled("row", coords, variables, facts)


def kl_divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(softmax(before) ‖ softmax(after)) over the last axis, in nats; [..., vocab] -> [...]."""
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _logits(recipe: Recipe, state: Checkpoint, batches: Batches) -> dict[str, Tensor]:
    """Logits [rows, vocab] of every batch in fp64, those of one length in one forward pass."""
    if not batches:
        raise ValueError("there are no batches; give at least one, as {label: batch}.")
    tensors = {**state.parameters, **state.buffers}
    found: dict[str, Tensor] = {}
    for width in {batch.tokens.shape[1] for batch in batches.values()}:
        names = [name for name, batch in batches.items() if batch.tokens.shape[1] == width]
        plain = [replace(batches[name], distractors=None, example_ids=None) for name in names]
        with torch.no_grad(), eval_mode(recipe.model), state.random_state():
            logits = call_with(target_logits, recipe.model, tensors, concatenate(plain)).double()
        found |= dict(zip(names, torch.split(logits, [len(batch) for batch in plain]), strict=True))
    return {name: found[name] for name in batches}


def _over(batches: Batches, logits: Sequence[Tensor], function: Any) -> Array:
    """The mean over rows of each batch: [n_examples]."""
    return np.array([float(function(z, b).mean()) for z, b in zip(logits, batches.values(), strict=True)])


def _right(logits: Tensor, batch: Batch) -> Tensor:
    return (logits.argmax(-1) == batch.targets).double()


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch.targets, reduction="none")


def _correct(logits: Tensor, batch: Batch) -> Tensor:
    return logits.gather(-1, batch.targets[:, None]).squeeze(-1)


def _along_examples(
    batches: Batches, coords: Coords | None, variables: Mapping[str, tuple[Any, str, str]], provenance: str
) -> xr.Dataset:
    return labelled("example", {"example": list(batches), **(coords or {})}, variables, provenance)
