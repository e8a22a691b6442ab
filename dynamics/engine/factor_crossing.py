"""Crossed factors: gradients Σ δ xᵀ whose x and δ come from different runs, over all or some positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from dynamics.engine.runs import Runs
from dynamics.sites import Site
from dynamics.steps.factors import Factors, check_complete, crossed

Run = Literal["base", "source"]


class CrossedFactors:
    """The gradients Σ δ xᵀ of one contrast with x and δ each from the base or the source run.

    Args:
        runs: the contrast's two runs.
        sites: whose parameters are wanted.

    Raises:
        SiteError: a parameter's gradient has no factors, or its factors do not make it up.
    """

    def __init__(self, runs: Runs, sites: Iterable[Site]) -> None:
        self.runs = runs
        trained = {name for name, p in runs.recipe.model.named_parameters() if p.requires_grad}
        self.wanted = {name for site in sites for name in site.covers if name in trained}
        self._factors: dict[Run, Factors] = {"base": runs.base_factors, "source": runs.source_factors}
        self._known: dict[tuple[Run, Run, Sequence[int] | None], Mapping[str, Tensor]] = {}
        for run in self._factors.values():
            check_complete(runs.recipe, runs.checkpoint, run, self.wanted)

    def gradient(self, x: Run, delta: Run, positions: tuple[int, ...] | None) -> dict[str, Tensor | None]:
        """The base gradient with what the positions contribute made of x of one run and δ of another."""
        gradients = dict(self.runs.base.gradients)
        ours, theirs = self._contribution("base", "base", positions), self._contribution(x, delta, positions)
        for name in self.wanted & (ours.keys() | theirs.keys()):
            known = gradients[name]
            if name not in theirs:  # its module did not run
                gradients[name] = None if known is None or positions is None else known - ours[name]
            else:
                gradients[name] = theirs[name] if known is None else known + (theirs[name] - ours[name])
        return gradients

    def _contribution(self, x: Run, delta: Run, positions: tuple[int, ...] | None) -> Mapping[str, Tensor]:
        key = (x, delta, positions)
        if key not in self._known:
            recipe, state = self.runs.recipe, self.runs.checkpoint
            self._known[key] = crossed(
                recipe, state, self._factors[x], self._factors[delta], self.wanted, positions
            )
        return self._known[key]
