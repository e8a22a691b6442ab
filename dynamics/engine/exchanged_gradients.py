"""The base batch's gradient with the source batch's on one site at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dynamics.engine.factor_crossing import CrossedFactors
from dynamics.engine.runs import Runs
from dynamics.sites import Site
from dynamics.steps import StepGradient
from dynamics.trees import exchanged


def patched_gradients(runs: Runs, sites: Sequence[Site]) -> Iterator[StepGradient]:
    """The base run's gradient and buffers with the source run's on one site at a time.

    Of the source run's gradient what no site covers is released.
    """
    located = [site for site in sites if site.positions is not None]
    crossed = CrossedFactors(runs, located) if located else None
    covered = {name for site in sites for name in site.covers}
    whole = {n: g if n in covered else None for n, g in runs.source.gradients.items()}
    buffers = runs.source.buffers
    runs.release(("source",))
    for site in sites:
        if crossed and site.positions is not None:
            source = crossed.gradient("source", "source", site.positions)
        else:
            source = whole
        yield replace(
            runs.base,
            gradients=exchanged(runs.base.gradients, source, site.covers),
            buffers=exchanged(runs.base.buffers, buffers, site.covers),  # type: ignore[arg-type]
        )
