"""patch_signals: exchange the backward signal at an activation, finish the backward pass, take the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from typing import get_args

import xarray as xr

from checkpoints import Checkpoint
from dynamics.engine.arguments import check_step_arguments
from dynamics.engine.exclusive import exclusive
from dynamics.engine.runs import Runs, Variants, reference_models_trimmed, run_contrasts, stepped_variants
from dynamics.engine.stack_memory import HALF, chunks, models_per_stack
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, check_outputs, check_whole
from dynamics.steps import StepGradient, gradient
from dynamics.steps.caching import recorded
from dynamics.steps.fallbacks import Fallback, in_halves
from dynamics.steps.pullbacks import Pullbacks, alike, pullbacks
from dynamics.steps.stacks import Stack
from dynamics.steps.taps import Cache, Forward, check_covers, exchanging

ONE_BY_ONE = "a backward pass for each site"
NOT_LINEAR = "a batched backward pass found another gradient than one by itself"


@exclusive
def patch_signals(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    forward: Forward = "base",
) -> xr.Dataset:
    """Take each contrast's base step with the source run's backward signal dL/da at one activation at a time.

    λ' = (1 − μ) ⊙ λ_base + μ ⊙ λ_source on the slice μ; the backward pass then goes on from λ'. Gradients of
    the activation's ancestors change, all others are the base run's to the bit. Upstream of it a linear
    layer's gradient is Σ λ' xᵀ with the **base** run's inputs x.

    Args:
        recipe, checkpoint, contrasts, measure: as `patch_gradients`; base and source batches of one shape.
        sites: outputs of submodules (`sites.activations`), each patched alone.
        forward: whose activation goes forward at the site. "base": the base run's, so that the signal alone is
            exchanged. "source": the source run's activation is exchanged as well, straight through; at a full
            cut of the residual stream, everything downstream then has the source run's gradient.

    Returns, Raises: as `patch_gradients`; a SiteError also where the two runs differ in shape.

    How this differs from returning a cached tensor from a forward hook, which is the obvious thing to try: that
    tensor is detached, so the graph is severed there. No signal reaches anything upstream, backward hooks
    there never fire, all upstream gradients are None, and the optimizer skips those parameters altogether:
    not even their decay or momentum moves them. "Forward only" and "forward and backward" are then the same
    row, and neither is a patched step. Replacing the signals of the source run by the source run's own
    gives recovery 1 exactly, and says nothing. And taking no step at all has a recovery of its own,
    (untouched − base) / (source − base), which is no zero: rows near it did not move at all. Compare with
    `untouched` and `coasted` in every result (the seed's puzzle; `tests/patching/test_signals_puzzle.py`).

    Source: the seed's backward-signal patching, done with an autograd function inside the graph.
    """
    check_step_arguments("patch_signals", recipe, checkpoint, contrasts, sites, measure)
    check_outputs(sites, recipe.model)
    check_whole(
        sites,
        "patch_signals",
        "cut the activation instead: sites.activations(model, glob, by=('pos',), like=batch)",
    )
    if forward not in get_args(Forward):
        raise ValueError(f"forward={forward!r}: whose activation goes forward is one of {get_args(Forward)}.")
    patched_models = partial(_patched_models, forward=forward, linear={})
    return run_contrasts("patch_signals", recipe, checkpoint, contrasts, sites, measure, patched_models)


def _patched_models(
    runs: Runs, sites: Sequence[Site], forward: Forward, linear: dict[str, bool]
) -> Iterator[Stack | Variants]:
    hooks = list(dict.fromkeys(name for site in sites for name in site.covers))
    recipe, state = runs.recipe, runs.checkpoint
    step, source = recorded(recipe, state, runs.contrast.source, hooks, runs.batch_names[1])
    base, kept = runs.contrast.base, None
    if forward == "base":
        kept = pullbacks(recipe, state, base, hooks, runs.batch_names[0])
    known = {
        "source": step,
        "base": kept.step if kept else gradient(recipe, state, base, runs.batch_names[0]),
    }
    runs = replace(runs, known=known)
    return chain(
        reference_models_trimmed(runs),
        stepped_variants(runs, _patched(runs, sites, forward, linear, source, kept), HALF),
    )


def _patched(
    runs: Runs,
    sites: Sequence[Site],
    forward: Forward,
    linear: dict[str, bool],
    source: Cache,
    kept: Pullbacks | None,
) -> Iterator[StepGradient]:
    """The patched gradients in order.

    Args:
        linear: of which activations the fast way was found to hold; kept from contrast to contrast.
        source: what passed the sites in the source run.
        kept: the base run with its graph, where its backward pass may be taken up from the sites.
    """
    recipe, state, batch, where = runs.recipe, runs.checkpoint, runs.contrast.base, runs.batch_names[0]

    def one(site: Site) -> StepGradient:
        return gradient(recipe, state, batch, where, exchanging(site, source, forward))

    def at_once(kept: Pullbacks, sites: Sequence[Site]) -> list[StepGradient]:
        name = next(iter(sites[0].covers))
        if not linear.get(name, True):
            raise Fallback(NOT_LINEAR)
        if not all(kept.takes(s, source) for s in sites):
            raise Fallback("a site is no slice of one activation that both runs compute once")
        alone = None if name in linear else one(sites[0]).gradients
        try:
            found = kept.exchanging(sites, source)
        except Fallback:
            linear.setdefault(name, False)
            raise
        if alone is not None:
            linear[name] = alike(found[0].gradients, alone)
            if not linear[name]:
                raise Fallback(NOT_LINEAR)
        return found

    runs.release()
    paths = runs.steps.paths
    for site in sites:
        check_covers(site, source)
    if kept is None:
        paths.took("signals", ONE_BY_ONE)
        yield from map(one, sites)
        return
    for _, group in groupby(sites, key=lambda site: list(site.covers)):
        for chunk in chunks(group, models_per_stack(state.parameters.values(), HALF)):
            try:
                found = iter(in_halves(partial(at_once, kept), chunk, paths, "signals"))
                paths.took("signals", "one batched backward pass for the sites of an activation")
            except Fallback as error:
                paths.fell_back("signals", ONE_BY_ONE, str(error))
                found = map(one, chunk)
            yield from found
            del found  # gradients, before the next ones are taken
