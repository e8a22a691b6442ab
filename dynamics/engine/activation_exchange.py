"""Exchanging activations between two forward passes: both runs of contrasts, what is put in, and its hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.engine.arguments import check_arguments, check_sources, naming
from dynamics.engine.forward_passes import (
    Activations,
    ContrastBatch,
    FrozenModel,
    MeasurePass,
    contrast_batches,
    measure_passes,
    read_activations,
)
from dynamics.measures import Measure, MeasureError
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import Labels
from dynamics.sites import Site, SiteError, check_outputs, check_whole
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.taps import Cache, Taps, check_covers, runs_of

Values = Literal["source", "zero", "mean"]


@dataclass(frozen=True)
class ActivationExchange:
    """Both runs of joined contrasts, and what the base run's activations are exchanged for.

    Attributes:
        base_values, source_values: what each measure of the pass gives.
        base: the base run's activations by key.
        new: what they are exchanged for.
    """

    joined: ContrastBatch
    base_values: list[Tensor]
    source_values: list[Tensor]
    base: Activations
    new: Activations


def activation_exchanges(
    frozen: FrozenModel,
    source_model: FrozenModel,
    one_pass: MeasurePass,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    values: Values,
) -> Iterator[ActivationExchange]:
    """The two runs of all contrasts, batch by batch, checked against the sites."""
    names = list(dict.fromkeys(name for site in sites for name in site.covers))
    all_joined = list(contrast_batches(contrasts, sites, one_pass))
    means = _means(source_model, one_pass, all_joined, names) if values == "mean" else {}
    for joined in all_joined:
        with naming(joined.name):
            base_values, base = read_activations(frozen, one_pass, joined.base, names)
            source_values, source = read_activations(source_model, one_pass, joined.source, names)
        new = _replacements(values, base, source, means)
        whose = "the source run" if values == "source" else f"the {values} activations"
        for site in sites:
            check_covers(site, Cache(dict(new)))
            for name in site.covers:
                ours, theirs = runs_of(base, name), runs_of(new, name)
                if len(ours) != len(theirs):
                    raise SiteError(
                        f"Site {site.label!r}: {name!r} runs {len(ours)} times in the base run and {len(theirs)} "
                        f"times in {whose}; activations are exchanged run by run."
                    )
                for one, other in zip(ours, theirs, strict=True):
                    _check_shapes(f"Site {site.label!r}: {name!r}", one, other, whose)
        yield ActivationExchange(joined, base_values, source_values, base, new)


def exchange_taps(site: Site, values: Activations) -> Taps:
    """Taps that put other values where a site is, run by run."""

    def change(name: str, key: str, activation: Tensor) -> Tensor:
        patched, cut = activation.clone(), site.covers[name]
        patched[cut] = values[key][cut]
        return patched

    return Taps(site.covers, change)


def _check_shapes(what: str, ours: Tensor, theirs: Tensor, whose: str) -> None:
    if ours.shape != theirs.shape:
        raise SiteError(
            f"{what} has shape {tuple(ours.shape)} in the base run and {tuple(theirs.shape)} in {whose}. Give both "
            "batches one shape: prompts of equal length."
        )


def _means(
    frozen: FrozenModel, one_pass: MeasurePass, all_joined: Sequence[ContrastBatch], names: Sequence[str]
) -> dict[str, Tensor]:
    """Mean of the source runs' activations over all rows of all contrasts: [1, ...] by key."""
    total: dict[str, Tensor] = {}
    n_rows = 0
    for joined in all_joined:
        kept = read_activations(frozen, one_pass, joined.source, names)[1]
        n_rows += len(next(iter(kept.values()), ()))
        for key, activation in kept.items():
            part = activation.double().sum(0, keepdim=True)
            _check_shapes(repr(key), total.setdefault(key, torch.zeros_like(part)), part, joined.name)
            total[key] += part
    return {key: part / n_rows for key, part in total.items()}


def _replacements(
    values: Values, base: Activations, source: Activations, means: Activations
) -> dict[str, Tensor]:
    """What the base run's activations are exchanged for, by key."""
    if values == "source":
        return dict(source)
    if values == "zero":
        return {key: torch.zeros_like(activation) for key, activation in base.items()}
    for key, activation in base.items():
        _check_shapes(repr(key), activation[:1], means[key], "the mean activations")
    return {key: means[key].to(activation.dtype).expand_as(activation) for key, activation in base.items()}


Array = npt.NDArray[np.float64]


class ActivationTable:
    """One call of a verb of activations: its measures, the references as they are filled in, and its Dataset.

    Args:
        verb: its name.
        frozen: the model that runs the base batches and receives.
        contrasts, measure: as the verb was called.
        source: the model that runs the source batches; by default the same.

    Attributes:
        by_name: the measures.
        passes: the forward passes that they take.
        references: `base` and `source`, [n_measures, n_examples].
        paths: where it is noted how activations were exchanged.
    """

    def __init__(
        self,
        verb: str,
        frozen: FrozenModel,
        contrasts: Sequence[Contrast],
        measure: Measure | Mapping[str, Measure],
        source: FrozenModel | None = None,
    ) -> None:
        self._source = source or frozen
        self._verb, self._frozen, self._contrasts, self._measure = verb, frozen, contrasts, measure
        self.by_name = measures.named(measure)
        self.passes = measure_passes(self.by_name)
        self.references = {name: self.empty() for name in ("base", "source")}
        self.paths = ComputePaths(verb)

    def empty(self, *sizes: int) -> Array:
        """NaN, [n_measures, n_examples, *sizes]."""
        return np.full((len(self.by_name), len(self._contrasts), *sizes), np.nan)

    def exchanges(
        self, sites: Sequence[Site], values: Values
    ) -> Iterator[tuple[MeasurePass, ActivationExchange]]:
        """Every pass of every batch of contrasts; fills in the references."""
        for one_pass in self.passes:
            if one_pass.alone is None:
                self.paths.took("measures", "one forward pass for all measures of the logits")
            else:
                self.paths.took("measures", "a forward pass for each function of (model, batch)")
            both = self._frozen, self._source
            for exchange in activation_exchanges(*both, one_pass, self._contrasts, sites, values):
                joined = exchange.joined
                several = "contrasts of one shape as one batch" if len(joined.members) > 1 else "by itself"
                self.paths.took("contrasts", several)
                fill(self.references["base"], one_pass, joined, exchange.base_values)
                fill(self.references["source"], one_pass, joined, exchange.source_values)
                yield one_pass, exchange

    def labels(self, **settings: str) -> Labels:
        """Labels of the Dataset, with the settings and the paths taken in its provenance."""
        other = {} if self._source is self._frozen else {"source_step": self._source.step}
        facts = {**settings, **other, "paths": self.paths.facts()}
        return Labels(self._measure, self._contrasts, self._verb, self._frozen.step, facts)


def fill(array: Array, one_pass: MeasurePass, joined: ContrastBatch, found: Sequence[Tensor]) -> None:
    """Write what the measures of a pass gave, averaged over each contrast's rows, into [n_measures, n_examples].

    Raises:
        MeasureError: a measure is NaN for every row of a contrast.
    """
    for place, name, values in zip(one_pass.places, one_pass.names, found, strict=True):
        for member, rows, mean in zip(joined.members, joined.rows, joined.means(values), strict=True):
            if bool(mean.isnan()) and bool(values[rows if values.ndim else ...].isnan().all()):
                raise MeasureError(
                    f"measure {name!r} gave NaN for every row of contrast number {member}; expected numbers."
                )
            array[place, member] = float(mean)


def check_activation_arguments(
    verb: str,
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    values: Values,
) -> None:
    """What all verbs of activations check of their arguments at their door."""
    check_arguments(verb, recipe, checkpoint, contrasts, sites, measure)
    check_sources(verb, contrasts)
    if values not in get_args(Values):
        raise ValueError(f"values={values!r}: what is put in is one of {get_args(Values)}.")


def check_activation_sites(verb: str, sites: Sequence[Site], recipe: Recipe) -> None:
    """Raise a SiteError unless every site cuts outputs of the model's submodules."""
    check_outputs(sites, recipe.model)
    instead = "cut the activation instead: sites.activations(model, glob, by=('pos',), like=batch)"
    check_whole(sites, verb, instead)
