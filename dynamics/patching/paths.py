"""patch_paths: exchange what one component writes, as far as one other component reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics.engine.activation_exchange import (
    ActivationExchange,
    ActivationTable,
    Values,
    check_activation_arguments,
    check_activation_sites,
    fill,
)
from dynamics.engine.arguments import naming
from dynamics.engine.exclusive import exclusive
from dynamics.engine.forward_passes import FrozenModel, measure_with_taps
from dynamics.engine.path_edges import by_hooks, with_heads, written_at
from dynamics.engine.progress import progress_bar
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site
from dynamics.sites.edges import End, Path, apart, check_paths, receivers_of, senders_of
from dynamics.steps.taps import Taps


@exclusive
def patch_paths(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    values: Values = "source",
) -> xr.Dataset:
    """Run each contrast's base batch with what a sender writes exchanged for one receiver alone, and measure it.

        patched = M(base batch | r reads Σ_w w + Σ_s (s(source batch) − s))    s in S: w, s as written in this run

    All other components read what they read, and everything after the receiver follows. What is exchanged is the
    edge to r alone: neither what s does to r by way of components in between, nor anything else that s does. All
    positions are exchanged, each for its own. Of a site of several edges (`sites.together`, `sites.outside`) all
    are exchanged in one run; a sender whose own inputs changed writes what follows from them to receivers that the
    site leaves alone. So a clean base, a corrupted source and all edges outside a circuit measure what the circuit
    does by itself.

    Args:
        recipe, checkpoint, contrasts, measure: as `patch_activations`. The model is a toy or a bridge; its switches
            are on while this runs and afterwards as they were.
        sites: paths (`sites.paths`), length n_sites, each exchanged alone.
        values: what takes the sender's place: what the "source" run writes, "zero", or the "mean" of the source
            runs over all rows of all contrasts, position by position.

    Returns:
        As `patch_activations`: `patched`, `effect` [example, site] and the references `base`, `source` [example].

    Raises:
        SiteError: a site is no path of the model, the model has no switches, or base and source differ in shape.
        RecipeError: the checkpoint is of another model, or given for a bridge.

    Source: path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023), of direct paths; with several edges, edge
        ablation (Conmy et al. 2023). As TransformerLens's `get_act_patch_direct_path` and `faithfulness`.
    """
    check_activation_arguments("patch_paths", recipe, checkpoint, contrasts, sites, measure, values)
    chosen = check_paths(sites, recipe.model)
    with apart(recipe.model):
        frozen = FrozenModel.of(recipe, checkpoint)
        table = ActivationTable("patch_paths", frozen, contrasts, measure)
        patched = table.empty(len(sites))
        begins, ends = senders_of(recipe.model), receivers_of(recipe.model)
        written = written_at(chosen, begins)
        check_activation_sites("patch_paths", written, recipe)
        with progress_bar("patch_paths", len(contrasts) * len(sites) * len(table.passes), "patch") as bar:
            for one_pass, exchange in table.exchanges(written, values):
                joined = exchange.joined
                with naming(joined.name):
                    for number, site in enumerate(chosen):
                        taps = _rerouting(site, begins, ends, exchange)
                        found = measure_with_taps(frozen, one_pass, joined.base, taps)
                        fill(patched[..., number], one_pass, joined, found)
                        bar.update(len(joined.members))
    return table.labels(values=values).effects(patched, table.references, sites)


def _rerouting(
    site: Path, begins: Mapping[str, End], ends: Mapping[str, End], exchange: ActivationExchange
) -> Taps:
    """Taps that let the receivers of a site read other values than its senders write, run by run."""
    edges = by_hooks(site, begins, ends)
    written: dict[str, Tensor] = {}

    def change(name: str, key: str, activation: Tensor) -> Tensor:
        if name not in edges:
            written[key] = activation.detach().clone()
            return activation
        run, patched = key.removeprefix(name), activation.clone()
        read = with_heads(patched)  # a view
        for hook, heads in edges[name].items():
            moved = with_heads(exchange.new[hook + run] - written[hook + run])
            weights = moved.new_zeros(read.shape[2], moved.shape[2])
            weights[tuple(torch.tensor(heads).T)] = 1
            read += torch.einsum("rs,bpsd->bprd", weights, moved)
        return patched

    senders = dict.fromkeys(hook for of_receiver in edges.values() for hook in of_receiver)
    return Taps([*senders, *edges], change)
