"""patch_paths: exchange what one component writes, as far as one other component reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.engine.forward_passes import (
    Exchange,
    Standing,
    Values,
    exchanges,
    measured,
    passes,
)
from dynamics.engine.runs import SECONDS_BEFORE_PROGRESS
from dynamics.measures import Measure
from dynamics.patching.activations import check_activation_sites, fill
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import Labels
from dynamics.sites import Site
from dynamics.sites.edges import End, Path, apart, check_paths, receivers_of, senders_of
from dynamics.steps.taps import Taps


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
    chosen = check_paths(sites, recipe.model)
    by_name = measures.named(measure)
    asked = passes(by_name)
    shape = len(by_name), len(contrasts)
    patched = np.full((*shape, len(sites)), np.nan)
    references = {name: np.full(shape, np.nan) for name in ("base", "source")}
    total = len(contrasts) * len(sites) * len(asked)
    delay = SECONDS_BEFORE_PROGRESS
    with (
        apart(recipe.model),
        tqdm(total=total, desc="patch_paths", unit="patch", delay=delay) as bar,
    ):
        standing = Standing.of(recipe, checkpoint)
        begins, ends = senders_of(recipe.model), receivers_of(recipe.model)
        written = written_at(chosen, begins)
        check_activation_sites("patch_paths", recipe, contrasts, written, values)
        for one_pass in asked:
            for exchange in exchanges(standing, one_pass, contrasts, written, values):
                pack = exchange.pack
                fill(references["base"], one_pass, pack, exchange.base_values)
                fill(references["source"], one_pass, pack, exchange.source_values)
                for number, site in enumerate(chosen):
                    taps = _rerouting(site, begins, ends, exchange)
                    found = measured(standing, one_pass, pack.base, taps)
                    fill(patched[..., number], one_pass, pack, found)
                    bar.update(len(pack.members))
    labels = Labels(measure, contrasts, "patch_paths", standing.step, {"values": values})
    return labels.effects(patched, references, sites)


def written_at(paths: Sequence[Path], begins: Mapping[str, End]) -> list[Site]:
    """Sites of the whole activations where the senders of paths write."""
    senders = {sender for site in paths for sender, _ in site.edges}
    hooks = dict.fromkeys(end.hook for sender, end in begins.items() if sender in senders)
    return [Site(hook, {hook: ...}) for hook in hooks]


def by_hooks(
    site: Path, begins: Mapping[str, End], ends: Mapping[str, End]
) -> dict[str, dict[str, list[tuple[int, int]]]]:
    """(receiver's head, sender's head) of a site's edges, by receiver's and sender's hook; 0 without heads."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for sender, receiver in site.edges:
        begin, end = begins[sender], ends[receiver]
        heads = max(end.head, 0), max(begin.head, 0)
        found.setdefault(end.hook, {}).setdefault(begin.hook, []).append(heads)
    return found


def with_heads(activation: Tensor) -> Tensor:
    """[batch, pos, d_model] -> [batch, pos, 1, d_model]; what has heads stays."""
    return activation[:, :, None] if activation.ndim == 3 else activation


def _rerouting(site: Path, begins: Mapping[str, End], ends: Mapping[str, End], exchange: Exchange) -> Taps:
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
