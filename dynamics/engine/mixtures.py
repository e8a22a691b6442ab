"""Models mixed element by element from two others: the base model with the source model's elements on a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import xarray as xr
from torch import Tensor, nn

from dynamics.engine.measuring import CachedPrefixes
from dynamics.engine.runs import REFERENCE_ORDER, Runs, Variants, reference_models_trimmed
from dynamics.engine.stack_memory import QUARTER, models_per_stack, trim_freed_memory
from dynamics.sites import Site
from dynamics.steps.stacks import Stack, Workspace


def mixed_models(runs: Runs, sites: Sequence[Site]) -> Iterator[Stack | Variants]:
    """The references, and the base model with the source model's elements on one site at a time.

    Stacks hold copies of the tensors that their sites cover, and no others.
    """
    runs.steps.paths.took("steps", "elements of two finished steps")
    kept: dict[str, dict[str, Tensor]] = {}
    names = iter(REFERENCE_ORDER)
    for models in reference_models_trimmed(runs):
        yield models
        kept |= {name: m for m, name in zip(models, names, strict=False) if name in ("base", "source")}
        del models  # before the next ones are made
        runs.release(kept)
    trim_freed_memory(runs.checkpoint.parameters)
    yield from mixtures(kept["base"], kept["source"], sites, runs.space)


def mixtures(
    base: Mapping[str, Tensor], source: Mapping[str, Tensor], sites: Sequence[Site], space: Workspace
) -> Iterator[Variants]:
    """The base model with the source model's elements on one site at a time, as many at once as memory allows.

    Each holds until the next one is asked for.
    """
    prefixes: CachedPrefixes = {}
    covered: dict[str, Tensor] = {}
    pending: list[Site] = []
    for site in sites:
        wider = covered | {name: base[name] for name in site.covers}
        if len(pending) + 2 > models_per_stack(wider.values(), QUARTER) and pending:
            yield Variants(_mixed(base, source, pending, space), prefixes)
            pending, wider = [], {name: base[name] for name in site.covers}
        pending, covered = [*pending, site], wider
    if pending:
        yield Variants(_mixed(base, source, pending, space), prefixes)


def in_model_order(
    model: nn.Module, sites: Sequence[Site], run: Callable[[Sequence[Site]], xr.Dataset]
) -> xr.Dataset:
    """What `run` gives for the sites, which it gets in the order in which the model holds what they cover.

    Neighbours then share a stack, and what comes before the first change of all. Sites with positions come last.
    """
    places = {n: i for i, n in enumerate([*dict(model.named_parameters()), *dict(model.named_buffers())])}

    def place(i: int) -> tuple[bool, int]:
        return sites[i].positions is not None, min(places[name] for name in sites[i].covers)

    order = sorted(range(len(sites)), key=place)
    found = run([sites[i] for i in order])
    return found.isel(site=sorted(range(len(sites)), key=order.__getitem__))


def _mixed(
    base: Mapping[str, Tensor], source: Mapping[str, Tensor], sites: Sequence[Site], space: Workspace
) -> Stack:
    """The base model, then its variants with the source's value on one of the sites each."""
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
