"""patch_activations: exchange a forward activation and measure that same forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import xarray as xr
from torch import Tensor, nn

from checkpoints import Checkpoint, CheckpointPair
from dynamics.batch import Batch
from dynamics.engine.activation_exchange import (
    ActivationExchange,
    ActivationTable,
    Values,
    check_activation_arguments,
    check_activation_sites,
    exchange_taps,
    fill,
)
from dynamics.engine.arguments import check_all, naming
from dynamics.engine.exclusive import exclusive
from dynamics.engine.forward_passes import FrozenModel, MeasurePass, measure_with_taps
from dynamics.engine.progress import progress_bar
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.taps import runs_of
from dynamics.trees import Index


@exclusive
def patch_activations(
    recipe: Recipe,
    checkpoint: Checkpoint | CheckpointPair | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    values: Values = "source",
) -> xr.Dataset:
    """Run each contrast's base batch with the source run's activation at one site at a time, and measure it.

        patched = M(base batch | a_S := a_S(source batch))

    Base the corrupted prompt and source the clean one is denoising, `contrast.reversed()` noising. Positions are
    aligned: position p of the source goes to position p of the base. No step is taken: the measure is that of
    the base batch itself, so both batches carry the clean answer as their target, and a contrast's probe plays no
    part here.

    Args:
        recipe: its model, which is not changed; loss and optimizer play no part. A Hugging Face model is taken as
            any module; as a `TransformerBridge` it has TransformerLens's hooks (`dynamics.models.bridges`).
        checkpoint: whose parameters are measured; None takes the model as it stands, a bridge always. Of a
            `CheckpointPair` the source checkpoint runs the source batches and the base checkpoint receives what it
            computes: activations of another moment of training, or of another run. Those of a bridge are captured
            of one: `Checkpoint.capture(dy.bridge(model, tokenizer))`.
        contrasts: pairs of batches of one shape, length n_examples; with a pair of checkpoints a base alone will
            do, which then runs through both. Those that are a `Batch` are run many at a time where the measures are
            of the logits; the others one by one.
        sites: outputs of submodules (`sites.activations`), length n_sites, each exchanged alone.
        measure: (model, batch) -> scalar or [rows], rows are averaged; or a dict of those, which becomes the dim
            `measure`. Measures of the logits share one pass for each site.
        values: what is put in: the "source" run's activation, "zero", or the "mean" of the source runs' over all
            rows of all contrasts, position by position: ablations. Then `source` is a reference all the same.

    Returns:
        `patched`, `effect` (patched − base) [example, site] and the references `base`, `source` [example], in
        the measure's units. `statistics.summarize` gives the normalised effect of the population,
        `statistics.pairwise_recovery` that of each pair.

    Raises:
        SiteError: a site covers what the model does not have, or base and source run differ in shape.
        RecipeError: the checkpoint is of another model, or given for a bridge.

    Source: activation patching (Meng et al. 2022; Wang et al. 2022); at TransformerLens's hook points the work is
        done by its `patching.generic_activation_patch`, elsewhere by forward hooks.
    """
    pair = checkpoint if isinstance(checkpoint, CheckpointPair) else None
    one = None if isinstance(checkpoint, CheckpointPair) else checkpoint
    if pair:
        check_all("patch_activations", "contrasts", contrasts, Contrast)
        contrasts = [replace(c, source=c.base) if c.source is None else c for c in contrasts]
    check_activation_arguments("patch_activations", recipe, one, contrasts, sites, measure, values)
    check_activation_sites("patch_activations", sites, recipe)
    frozen, source = FrozenModel.of_pair(recipe, pair) if pair else [FrozenModel.of(recipe, one)] * 2
    table = ActivationTable("patch_activations", frozen, contrasts, measure, source)
    patched = table.empty(len(sites))
    with progress_bar("patch_activations", len(contrasts) * len(sites) * len(table.passes), "patch") as bar:
        for one_pass, exchange in table.exchanges(sites, values):
            with naming(exchange.joined.name):
                for site, found in _patch(frozen, one_pass, exchange, sites, table.paths):
                    fill(patched[..., site], one_pass, exchange.joined, found)
                    bar.update(len(exchange.joined.members))
    return table.labels(values=values).effects(patched, table.references, sites)


def _patch(
    frozen: FrozenModel,
    one_pass: MeasurePass,
    exchange: ActivationExchange,
    sites: Sequence[Site],
    paths: ComputePaths,
) -> Iterator[tuple[int, list[Tensor]]]:
    """Patch each site: its number, and what the measures give."""
    by_hook: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        if _is_for_transformer_lens(frozen.model, one_pass, exchange, site):
            paths.took("patches", "TransformerLens's generic_activation_patch")
            by_hook.setdefault(next(iter(site.covers)), []).append(i)
        else:
            paths.took("patches", "forward hooks")
            taps = exchange_taps(site, exchange.new)
            yield i, measure_with_taps(frozen, one_pass, exchange.joined.base, taps)
    for hook, numbers in by_hook.items():
        cuts = [sites[i].covers[hook] for i in numbers]
        yield from zip(numbers, _by_transformer_lens(frozen, one_pass, exchange, hook, cuts), strict=True)


@torch.no_grad()
def _by_transformer_lens(
    frozen: FrozenModel, one_pass: MeasurePass, exchange: ActivationExchange, hook: str, cuts: list[Index]
) -> list[list[Tensor]]:
    """Let TransformerLens patch all slices of one hook point, in order."""
    from dynamics.models import lens  # there is no such model before transformer_lens is there

    found: list[list[Tensor]] = []

    def run(model: nn.Module, batch: Batch) -> None:
        lens.run_patched(
            model,
            batch.tokens,
            hook,
            cuts,
            exchange.new[hook],
            lambda logits: found.append(one_pass.read(logits, batch)),
        )

    frozen.run(run, exchange.joined.base)
    return found


def _is_for_transformer_lens(
    model: nn.Module, one_pass: MeasurePass, exchange: ActivationExchange, site: Site
) -> bool:
    """Whether a site is one slice at a hook point of TransformerLens's, and the measures are of the logits."""
    name = next(iter(site.covers))
    return (
        hasattr(model, "run_with_hooks")
        and one_pass.alone is None
        and isinstance(exchange.joined.base, Batch)
        and len(site.covers) == 1
        and name in getattr(model, "hook_dict", {})
        and len(runs_of(exchange.base, name)) == 1
    )
