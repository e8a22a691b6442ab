"""patch_updates: exchange finished parameter updates, after clipping and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics.measures import Measure
from dynamics.patching.experiment import REFERENCE_ORDER, Beside, Runs, experiment, references
from dynamics.patching.measuring import Beginnings
from dynamics.patching.memory import QUARTER, at_most
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check, check_whole
from dynamics.steps.stacks import Stack, Workspace


def patch_updates(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
) -> xr.Dataset:
    """Give one site at a time the value it has after the source step, the rest that after the base step.

    θ^S = θ_source on S, θ_base elsewhere: a selection, so disjoint sites add up exactly and nothing is
    coupled through the clip norm.

    Args, Returns, Raises: as `patch_gradients`; a SiteError also for a site with positions, which a finished
    update does not have.
    """
    check(sites, recipe.model)
    check_whole(sites, "patch_updates", "a finished update has none; use patch_gradients")
    places = {
        name: place
        for place, name in enumerate(
            [*dict(recipe.model.named_parameters()), *dict(recipe.model.named_buffers())]
        )
    }
    order = sorted(range(len(sites)), key=lambda i: min(places[name] for name in sites[i].covers))
    found = experiment(
        "patch_updates", recipe, checkpoint, contrasts, [sites[i] for i in order], measure, _outcomes
    )
    return found.isel(site=sorted(range(len(sites)), key=order.__getitem__))


def _outcomes(runs: Runs, sites: Sequence[Site]) -> Iterator[Stack | Beside]:
    kept: dict[str, dict[str, Tensor]] = {}
    names = iter(REFERENCE_ORDER)
    for models in references(runs):
        yield models
        kept |= {name: m for m, name in zip(models, names, strict=False) if name in ("base", "source")}
        del models  # before the next ones are made
        if kept:
            runs.forget()
    base, source = kept["base"], kept["source"]
    begun: Beginnings = {}
    covered: dict[str, Tensor] = {}
    pending: list[Site] = []
    for site in sites:
        wider = covered | {name: base[name] for name in site.covers}
        if len(pending) + 2 > at_most(wider.values(), QUARTER) and pending:
            yield Beside(_exchanged(base, source, pending, runs.space), begun)
            pending, wider = [], {name: base[name] for name in site.covers}
        pending, covered = [*pending, site], wider
    yield Beside(_exchanged(base, source, pending, runs.space), begun)


def _exchanged(
    base: Mapping[str, Tensor], source: Mapping[str, Tensor], sites: Sequence[Site], space: Workspace
) -> Stack:
    """The base model, and beside it those with the source's value on one of the sites each."""
    names = dict.fromkeys(name for site in sites for name in site.covers)
    stacked = {
        name: space.empty(place, base[name], 1 + len(sites), *base[name].shape)
        for place, name in enumerate(names)
    }
    for name, tensor in stacked.items():
        tensor[:] = base[name]
    for row, site in enumerate(sites, start=1):
        for name, index in site.covers.items():
            stacked[name][row][index] = source[name][index]
    shared = {name: tensor for name, tensor in base.items() if name not in names}
    return Stack(1 + len(sites), shared, stacked)
