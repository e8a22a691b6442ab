"""patch_activations: exchange a forward activation and measure that same forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.batch import Batch
from dynamics.labels import Labels, check_coordinates
from dynamics.measures import Measure
from dynamics.patching.experiment import SECONDS_BEFORE_PROGRESS
from dynamics.patching.forwards import (
    Exchange,
    Pack,
    Pass,
    Standing,
    Values,
    exchanges,
    exchanging,
    measured,
    passes,
)
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check_outputs, check_whole
from dynamics.steps.taps import runs_of
from dynamics.trees import Index

Array = npt.NDArray[np.float64]


def patch_activations(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
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
        checkpoint: whose parameters are measured; None takes the model as it stands, a bridge always.
        contrasts: pairs of batches of one shape, length n_examples. Those that are a `Batch` are run many at a time
            where the measures are of the logits; the others one by one.
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
    check_activation_sites("patch_activations", recipe, contrasts, sites, values)
    by_name = measures.named(measure)
    standing = Standing.of(recipe, checkpoint)
    asked = passes(by_name)
    shape = len(by_name), len(contrasts)
    patched = np.full((*shape, len(sites)), np.nan)
    references = {name: np.full(shape, np.nan) for name in ("base", "source")}
    total = len(contrasts) * len(sites) * len(asked)
    with tqdm(total=total, desc="patch_activations", unit="patch", delay=SECONDS_BEFORE_PROGRESS) as bar:
        for one_pass in asked:
            for exchange in exchanges(standing, one_pass, contrasts, sites, values):
                pack = exchange.pack
                fill(references["base"], one_pass, pack, exchange.base_values)
                fill(references["source"], one_pass, pack, exchange.source_values)

                def keep(
                    site: int, found: list[Tensor], one_pass: Pass = one_pass, pack: Pack = pack
                ) -> None:
                    fill(patched[..., site], one_pass, pack, found)
                    bar.update(len(pack.members))

                _patch(standing, one_pass, exchange, sites, keep)
    labels = Labels(measure, contrasts, "patch_activations", standing.step, {"values": values})
    return labels.effects(patched, references, sites)


def _patch(
    standing: Standing,
    one_pass: Pass,
    exchange: Exchange,
    sites: Sequence[Site],
    keep: Callable[[int, list[Tensor]], None],
) -> None:
    """Patch each site, and hand what the measures give to `keep`, with the site's number."""
    by_hook: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        if _is_for_transformer_lens(standing.model, one_pass, exchange, site):
            by_hook.setdefault(next(iter(site.covers)), []).append(i)
        else:
            taps = exchanging(site, exchange.new)
            keep(i, measured(standing, one_pass, exchange.pack.base, taps))
    for hook, numbers in by_hook.items():
        _sweep(standing, one_pass, exchange, hook, {i: sites[i].covers[hook] for i in numbers}, keep)


@torch.no_grad()
def _sweep(
    standing: Standing,
    one_pass: Pass,
    exchange: Exchange,
    hook: str,
    cuts: Mapping[int, Index],
    keep: Callable[[int, list[Tensor]], None],
) -> None:
    """Let TransformerLens patch all slices of one hook point, by the site's number."""
    from dynamics.models import lens  # there is no such model before transformer_lens is there

    numbers = iter(cuts)

    def run(model: nn.Module, batch: Batch) -> None:
        lens.run_patched(
            model,
            batch.tokens,
            hook,
            list(cuts.values()),
            exchange.new[hook],
            lambda logits: keep(next(numbers), one_pass.read(logits, batch)),
        )

    standing.run(run, exchange.pack.base)


def _is_for_transformer_lens(model: nn.Module, one_pass: Pass, exchange: Exchange, site: Site) -> bool:
    """Whether a site is one slice at a hook point of TransformerLens's, and the measures are of the logits."""
    name = next(iter(site.covers))
    return (
        hasattr(model, "run_with_hooks")
        and one_pass.alone is None
        and isinstance(exchange.pack.base, Batch)
        and len(site.covers) == 1
        and name in getattr(model, "hook_dict", {})
        and len(runs_of(exchange.base, name)) == 1
    )


def fill(array: Array, one_pass: Pass, pack: Pack, found: Sequence[Tensor]) -> None:
    """Write what the measures of a pass gave into [n_measures, n_examples]."""
    for place, values in zip(one_pass.places, found, strict=True):
        for member, mean in zip(pack.members, pack.means(values), strict=True):
            array[place, member] = float(mean)


def check_activation_sites(
    verb: str, recipe: Recipe, contrasts: Sequence[Contrast], sites: Sequence[Site], values: Values
) -> None:
    """What both verbs of activations ask of their arguments."""
    if not contrasts or not sites:
        raise ValueError(
            f"{verb} was given no {'sites' if contrasts else 'contrasts'}; it needs at least one."
        )
    if values not in get_args(Values):
        raise ValueError(f"values={values!r}: what is put in is one of {get_args(Values)}.")
    check_outputs(sites, recipe.model)
    instead = "cut the activation instead: sites.activations(model, glob, by=('pos',), like=batch)"
    check_whole(sites, verb, instead)
    labels = [str(c.coords.get("example", f"contrast {i}")) for i, c in enumerate(contrasts)]
    if len(set(labels)) < len(labels):
        raise ValueError("contrasts share a label in coords['example']; give each its own.")
    check_coordinates(contrasts, sites)
