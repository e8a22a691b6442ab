"""Models mixed element by element from two others: the base model with the source model's elements on a site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

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
    base, source = kept["base"], kept["source"]
    prefixes: CachedPrefixes = {}
    covered: dict[str, Tensor] = {}
    pending: list[Site] = []
    for site in sites:
        wider = covered | {name: base[name] for name in site.covers}
        if len(pending) + 2 > models_per_stack(wider.values(), QUARTER) and pending:
            yield Variants(_mixed(base, source, pending, runs.space), prefixes)
            pending, wider = [], {name: base[name] for name in site.covers}
        pending, covered = [*pending, site], wider
    yield Variants(_mixed(base, source, pending, runs.space), prefixes)


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
