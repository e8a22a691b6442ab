"""attribute_training: divide what a stretch of training did to a measure among steps, parts and sources of data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from checkpoints import Checkpoint
from dynamics import measures
from dynamics.engine.arguments import check_step_arguments, naming
from dynamics.engine.batch_rows import MOST_DISAGREEMENT, NO_MEAN
from dynamics.engine.batch_sources import source_gradients
from dynamics.engine.exclusive import exclusive
from dynamics.engine.measure_gradients import MeasureGradients, MeasureQuery
from dynamics.engine.path_integral import StraightPath
from dynamics.engine.progress import progress_bar
from dynamics.engine.site_sums import site_sums
from dynamics.engine.stack_memory import trim_freed_memory
from dynamics.measures import Measure
from dynamics.recipe import Contrast, Recipe, RecipeError
from dynamics.results.labels import Labels
from dynamics.sites import Site, check
from dynamics.sites.site import check_whole, is_partition
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.replaying import TrainingLoop, resumed
from dynamics.steps.states import starting_point
from dynamics.steps.updates_by_source import BEFORE, DECAY, DividedUpdate, UpdatesBySource
from dynamics.steps.worker_threads import blocks, spread

Array = npt.NDArray[np.float64]
Sources = Callable[[Any], Sequence[Hashable]]


@exclusive
def attribute_training(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    batches: Sequence[Any],
    sites: Sequence[Site],
    probes: Mapping[str, Any],
    measure: Measure | Mapping[str, Measure],
    sources: Sources | None = None,
    every: int = 1,
    tolerance: float = 0.01,
    max_nodes: int = 65,
) -> xr.Dataset:
    """The account of a stretch of training: what every step, site and source of data wrote into a measure.

        M(θ_T) − M(θ_0) = Σ_t Σ_s Σ_j A_{t,s,j}        A_{t,s,j} = ∫₀¹ ⟨∇_s M(θ_t + αΔ_t), Δ_{t,s,j}⟩ dα

    The training itself is replayed: the ordinary step on a copy of the model, bit for bit that of a recorded run.
    Δ_t is a step's update, Δ_{t,s,j} its part in site s that comes from the gradients of source j. The integral is
    the trapezoid, whose gradients neighbouring steps share; a step that leaves too large a residual gets Simpson's
    rule on ever more nodes.

    By source, AdamW's first moment is linear in the gradients: each source has a first moment of its own, under the
    whole batch's clipping and second moment. So a source's part is conditional on those denominators; what it does
    to them is shared by all. Momentum from before the stretch is the source `before`, weight decay `decay`.

    It is an account of the path that was taken, not a counterfactual: without a source, training would have gone
    elsewhere. `patch_window` and training anew ask that.

    Args:
        recipe: how a step is taken. With `sources` its loss must be a mean over the batch's rows, and its optimizer
            AdamW, Adam or SGD, clipped by norm or not at all; else anything.
        checkpoint: where the stretch begins; None takes the recipe's model as it stands and a new optimizer.
        batches: the training batches in order, length n_steps. Each is asked for once, so a lazy sequence will do.
        sites: parts of the parameters, as `attribute_step`. Sums over sites are whole where these are a partition.
        probes: {label: batch}, what the measure is evaluated on; the labels become the dim `example`.
        measure: as `attribute_step`; in eval mode, averaged over a probe's rows.
        sources: batch -> a label for each row, such as `task.sources`; the labels become the dim `source`. Where
            the recipe accumulates, it is asked of each micro-batch.
        every: steps summed into one entry of the dim `step`.
        tolerance: of each step, |ΣA − change of the measure| / Σ|A| over the parameter tensors, above which it
            gets more nodes.
        max_nodes: at most so many gradients a step, both ends among them: 2 leave the trapezoid.

    Returns:
        `attribution` [step, (source,) site, example], positive where the measure was raised, in its units; `value`
        [step, example], the measure along the way; `residual` [step, example], the sum over all parameters less
        the change; `nodes` [step, example], gradients per step at most. An entry at step t is of the steps since
        the entry before it, so the first, where the stretch begins, is zero and holds the measure there: values
        less the first are the running sums of `attribution` and −`residual`. With a dim `measure` where several
        were asked for. `attrs["partition"]` is 1 where the sites are a partition of the trained parameters, else 0.

        Buffers, such as batch statistics, are no parameters: what they do is left in `residual`.

        Memory: six models, two more for each further (probe, measure), three while a step is refined; with sources
        one more for each.

    Raises:
        SiteError: a site covers what the model does not have, or positions, which an update does not have.
        ValueError: no batches or probes; a measure that cannot be differentiated; with `sources` a loss that is no
            mean over rows, or not one label for each row.
        RecipeError: no loss or optimizer; with `sources` an optimizer whose update cannot be divided.
        NonFiniteGradient: a gradient is not finite; names the probe and the parameter.

    Source: integrated gradients along the path of training; TracIn (Pruthi et al. 2020) sums first-order terms of
    plain SGD at checkpoints, ExPLAIND (Eichin et al. 2025) divides AdamW's steps by example.
    """
    asked = [Contrast(None, None, probe, {"example": str(label)}) for label, probe in probes.items()]
    check_step_arguments("attribute_training", recipe, checkpoint, asked, sites, measure)
    check(sites, recipe.model)
    check_whole(sites, "attribute_training", "an update is of all positions. Give the site without positions")
    if not len(batches) or every < 1 or tolerance < 0:
        raise ValueError(
            f"attribute_training was given {len(batches)} batches, every={every} and tolerance={tolerance}; "
            "expected one batch or more, every of 1 or more and a tolerance of 0 or more."
        )
    recipe.require_loss()
    if sources is not None and recipe.scaler is not None:
        raise RecipeError(
            "a GradScaler may skip a step, whose update then has no sources. Leave out sources=, or scaler=."
        )
    state = starting_point(recipe, checkpoint)
    paths = ComputePaths("attribute_training")
    with resumed(recipe, state) as loop, progress_bar("attribute_training", len(batches), "step") as bar:
        kept = replace(state, parameters={}, optimizer=None, scheduler=None)  # the loop has its own
        del state
        with naming(f"the model before step {loop.step}"):
            stretch = _Stretch(
                loop, kept, asked, sites, measures.named(measure), sources, tolerance, max_nodes, paths
            )
        entries = [stretch.entry()]
        for first in range(0, len(batches), every):
            entry = stretch.entry()
            for i in range(first, min(first + every, len(batches))):
                with naming(f"step {loop.step}"):
                    stretch.step(batches[i], entry)
                bar.update()
            entries.append(entry)
        labels = stretch.labels
    return _labelled(
        entries, labels, is_partition(sites, recipe.model), asked, sites, measure, every, tolerance, paths
    )


@dataclass
class _Entry:
    """What is summed into one entry of the dim `step`."""

    step: int
    value: Array
    residual: Array
    nodes: npt.NDArray[np.int64]
    attribution: dict[str, Array] = field(default_factory=dict)
    """By source, [n_measures · n_examples, n_sites]; under "" where no sources are asked."""


@dataclass
class _Stretch:
    """A stretch of training as it is taken: its loop, the measure's gradients where it stands, its sources."""

    loop: TrainingLoop
    checkpoint: Checkpoint
    asked: Sequence[Contrast]
    sites: Sequence[Site]
    by_name: Mapping[str, Measure]
    sources: Sources | None
    tolerance: float
    max_nodes: int
    paths: ComputePaths

    def __post_init__(self) -> None:
        recipe = self.loop.recipe
        self._parameters = {n: p for n, p in self.loop.model.named_parameters() if p.requires_grad}
        shapes = {n: p.shape for n, p in self._parameters.items()}
        self._sums = site_sums(self.sites, shapes)
        self._gradients = MeasureGradients(recipe, self.checkpoint, self.paths)
        names = {id(p): n for n, p in self.loop.model.named_parameters()}
        self._by_source = UpdatesBySource(self.loop.optimizer, names, recipe.clip) if self.sources else None
        self.paths.took("steps", "the training step itself, replayed")
        self._value, self._slopes = self._measured()

    @property
    def labels(self) -> list[str] | None:
        """The sources met, those of the data first; None where none were asked for."""
        if self._by_source is None:
            return None
        data = [label for label in self._by_source.labels if label not in (BEFORE, DECAY)]
        return [*data, BEFORE, DECAY]

    def entry(self) -> _Entry:
        """An entry without steps: nothing was written yet."""
        shape = (len(self.by_name), len(self.asked))
        return _Entry(self.loop.step, self._value.copy(), np.zeros(shape), np.zeros(shape, dtype=np.int64))

    def step(self, batch: Any, entry: _Entry) -> None:
        """Take a step and add its account to an entry."""
        buffers = {n: b.detach().clone() for n, b in self.loop.model.named_buffers()}
        before: dict[str, Tensor] = {} if self._by_source else self._copied()

        def divide() -> None:
            if self._by_source is not None:
                self._divide(batch, buffers)
                # only now: dividing needs the memory, and refuses forward passes that write into parameters
                before.update(self._copied())

        self.loop.take(batch, divide, partial(self._account, before, buffers, entry))
        entry.step = self.loop.step
        trim_freed_memory(self._parameters)

    def _copied(self) -> dict[str, Tensor]:
        """Copies of all parameters as they are."""
        return {n: p.detach().clone() for n, p in self.loop.model.named_parameters()}

    def _divide(self, batch: Any, buffers: dict[str, Tensor]) -> None:
        """Before the optimizer's step: give each source's part of the gradient to its moments."""
        assert self._by_source is not None
        assert self.sources is not None
        parameters = {n: p.detach() for n, p in self.loop.model.named_parameters()}
        state = replace(self.checkpoint, step=self.loop.step, parameters=parameters, buffers=buffers)
        self._by_source.begin()
        for label, share in source_gradients(self.loop.recipe, state, batch, self.sources, self.paths):
            self._by_source.add(label, share, self.loop.clipped_to)
            del share
        missed, lengths = self._by_source.missed()
        if missed > MOST_DISAGREEMENT * lengths:
            raise ValueError(
                f"the first moments of the batch's sources miss the optimizer's own by {missed:.2g}, with "
                f"{lengths:.2g} the sum of their lengths. {NO_MEAN}"
            )
        trim_freed_memory(self._parameters)

    def _account(self, before: dict[str, Tensor], buffers: dict[str, Tensor], entry: _Entry) -> None:
        """After the optimizer's step: its account, in place of the gradients it began with."""
        for p in self._parameters.values():
            p.grad = None
        trim_freed_memory(self._parameters)
        value, after = self._measured()
        end, slopes = value, after
        if any(not torch.equal(b, buffers[n]) for n, b in self.loop.model.named_buffers()):
            end, slopes = self._measured(buffers)
        mean = self._slopes
        for n, slope in mean.items():
            slope.add_(slopes[n]).mul_(0.5)
        del slopes
        trim_freed_memory(self._parameters)
        nodes, total = self._refined(mean, {**before, **buffers}, end - self._value)
        trim_freed_memory(self._parameters)
        entry.residual += total - (value - self._value)
        entry.nodes = np.maximum(entry.nodes, nodes)
        entry.value = value.copy()
        if self._by_source is None:
            for n, slope in mean.items():
                self._write(entry, "", n, slope * (self._parameters[n].detach() - before[n]))
        else:
            for n, update in self._by_source.divided(before):
                self._write_sources(entry, n, mean[n], update)
        self._value, self._slopes = value, after

    def _write_sources(self, entry: _Entry, name: str, slope: Tensor, update: DividedUpdate) -> None:
        """Divide a step's account of one parameter among its sources."""
        assert self._by_source is not None
        if update.decay is not None:
            self._write(entry, DECAY, name, slope * update.decay)
        weighted = slope.mul_(update.factor)
        for label, direction in zip(self._by_source.labels, update.directions, strict=True):
            self._write(entry, label, name, weighted * direction)

    def _write(self, entry: _Entry, label: str, name: str, elements: Tensor) -> None:
        """Add what one source wrote in one parameter, [n_measures · n_examples, *shape], to each site."""
        if label not in entry.attribution:
            entry.attribution[label] = np.zeros((len(self.by_name) * len(self.asked), len(self.sites)))
        self._sums.add(entry.attribution[label], name, elements)

    def _measured(self, buffers: Mapping[str, Tensor] | None = None) -> tuple[Array, dict[str, Tensor]]:
        """The measures where training stands, [n_measures, n_examples], and their gradients by trained parameter,
        [n_measures · n_examples, *shape]; with other buffers if any are given."""
        leaves = {n: p.detach() for n, p in self._parameters.items()}
        model = self.loop.model
        others = {n: p.detach() for n, p in model.named_parameters() if n not in leaves}
        others |= {n: b.detach() for n, b in model.named_buffers()} | dict(buffers or {})
        values, found = [], []
        for name, function in self.by_name.items():
            queries = [
                MeasureQuery(name, function, c.probe, others, str(c.coords["example"])) for c in self.asked
            ]
            value, gradients = self._gradients.of_probes(queries, leaves)
            values.append(value.cpu().numpy())
            found.append(gradients)
        joined = found[0] if len(found) == 1 else {n: torch.cat([g[n] for g in found]) for n in leaves}
        return np.stack(values), joined

    def _refined(
        self, mean: dict[str, Tensor], start: dict[str, Tensor], wanted: Array
    ) -> tuple[npt.NDArray[np.int64], Array]:
        """Take more nodes, into `mean`, where the trapezoid is too coarse; how many each took, and ⟨mean, Δ⟩.

        Args:
            mean: gradients, of the trapezoid.
            start: all tensors before the step.
            wanted: change of the measures, [n_measures, n_examples].
        """

        def of_block(unit: tuple[str, slice]) -> Tensor:
            n, at = unit
            change = self._parameters[n].detach().reshape(-1)[at] - start[n].reshape(-1)[at]
            return (mean[n].reshape(len(mean[n]), -1)[:, at] * change).sum(-1, dtype=torch.float64)

        units = [(n, at) for n, t in self._parameters.items() for at in blocks(t)]
        by_block = torch.stack(spread(of_block, units)).cpu().numpy()
        first = [i for i, (_, at) in enumerate(units) if not at.start]
        by_tensor = np.add.reduceat(by_block, first)
        total = by_tensor.sum(0).reshape(wanted.shape)
        sizes = np.abs(by_tensor).sum(0).reshape(wanted.shape)
        nodes = np.full(wanted.shape, 2)
        stop = {n: p.detach() for n, p in self._parameters.items()}
        coarse = (np.abs(total - wanted) > self.tolerance * sizes) & (self.max_nodes > 2)
        for m, i in np.argwhere(coarse).tolist():
            name, place = list(self.by_name)[m], m * len(self.asked) + i
            contrast = self.asked[i]
            path = StraightPath(
                self._gradients, start, stop, stop, contrast.probe, str(contrast.coords["example"])
            )
            trapezoid = {n: slope[place] for n, slope in mean.items()}
            found, nodes[m, i], total[m, i] = path.refined(
                name, self.by_name[name], trapezoid, float(wanted[m, i]), self.tolerance, self.max_nodes
            )
            for n, slope in found.items():
                mean[n][place] = slope
        return nodes, total


def _labelled(
    entries: Sequence[_Entry],
    labels: Sequence[str] | None,
    partition: bool,
    asked: Sequence[Contrast],
    sites: Sequence[Site],
    measure: Measure | Mapping[str, Measure],
    every: int,
    tolerance: float,
    paths: ComputePaths,
) -> xr.Dataset:
    shape = (*entries[0].value.shape, len(sites))
    nothing = np.zeros(shape)
    attribution = np.stack(
        [
            np.stack([entry.attribution.get(label, nothing).reshape(shape) for label in labels or [""]])
            for entry in entries
        ]
    )  # [step, source, measure, example, site]
    named = Labels(
        measure,
        asked,
        "attribute_training",
        entries[0].step,
        {"every": every, "tolerance": tolerance, "paths": paths.facts()},
    )
    return named.account(
        attribution=attribution.transpose(2, 0, 1, 4, 3),
        value=np.stack([e.value for e in entries], axis=1),
        residual=np.stack([e.residual for e in entries], axis=1),
        nodes=np.stack([e.nodes for e in entries], axis=1),
        steps=[entry.step for entry in entries],
        sources=labels,
        sites=sites,
        partition=partition,
    )
