"""compare: two checkpoints, all quantities."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

from checkpoints import Checkpoint
from dynamics.batch import concatenate
from dynamics.comparison.behaviour import Batches, Coords, compare_logits
from dynamics.comparison.internals import compare_internals
from dynamics.comparison.weights import compare_weights
from dynamics.recipe import Recipe
from dynamics.sites import Site


def compare(
    before: Checkpoint,
    after: Checkpoint,
    recipe: Recipe,
    batches: Batches,
    sites: Sequence[Site],
    coords: Coords | None = None,
    outputs: Sequence[Site] = (),
    patterns: Sequence[Site] = (),
) -> dict[str, xr.Dataset]:
    """What changed between two checkpoints: weights, answers, and where asked for what is computed on the way.

    Each part is a function of its own, for other models and other batches: `compare_weights`, `compare_logits`,
    `compare_activations`, `compare_patterns`; of three checkpoints `compare_updates`.

    Args:
        before, after: two checkpoints of one model: of one run, or of two runs at the same step.
        recipe: the model; a loss and an optimizer are not needed. It is not changed.
        batches: what is asked, by label, such as `task.evaluation` (the sets) or `tasks.alias_questions(task)`.
        sites: of parameters, such as `sites.matrices(model)`.
        coords: further labels of the batches.
        outputs: sites of activations, from `sites.activations`.
        patterns: sites of attention patterns, one head each.

    Returns:
        `weights` [site], `logits` [example], and with sites for them `activations` [site] and `patterns` [site],
        both on all batches together (which must be of one length then).

    Raises:
        RecipeError: a checkpoint is of another model. SiteError: a site does not fit the model or its part.
    """
    found = {
        "weights": compare_weights(before, after, recipe, sites),
        "logits": compare_logits(before, after, recipe, batches, coords),
    }
    if outputs or patterns:
        together = concatenate(list(batches.values()))
        found |= compare_internals(before, after, recipe, together, outputs, patterns)
    return found
