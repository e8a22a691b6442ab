"""interchange: position-aligned interchange interventions, measured by the probabilities of chosen tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import xarray as xr

from checkpoints import Checkpoint, CheckpointPair
from dynamics import measures
from dynamics.engine.exclusive import exclusive
from dynamics.patching.activations import patch_activations
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site


@exclusive
def interchange(
    recipe: Recipe,
    checkpoint: Checkpoint | CheckpointPair | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    tokens: Mapping[str, int],
) -> xr.Dataset:
    """What chosen tokens' probabilities become when a source prompt's activation is put into a base prompt.

    The base run of each contrast, with the source run's activation at one site at a time, position by position:
    `patch_activations` with `measures.probabilities(tokens)`. An activation is exchanged whole; inside a subspace
    of it TransformerLens does that (`transformer_lens.tools.analysis.interchange`).

    Args:
        recipe, checkpoint, contrasts, sites: as `patch_activations`; the usual sites are each layer's MLP output
            and attention input, `sites.activations(model, glob, by=("layer", "pos"), like=batch)` of
            "blocks.*.hook_mlp_out" and "blocks.*.ln1.hook_normalized".
        tokens: name -> token id; the names become the dim `measure`.

    Returns:
        As `patch_activations`: `patched` [measure, example, site] are the probabilities. `results.tidy` makes a
        data frame of it with one row for each token, example and site.

    Source: interchange interventions (Geiger et al. 2021).
    """
    return patch_activations(recipe, checkpoint, contrasts, sites, measures.probabilities(tokens))
