"""Forward passes of many contrasts as one batch, with activations read or exchanged by hooks on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from checkpoints import Checkpoint, CheckpointPair
from checkpoints.rng import RngState, replayed
from dynamics.batch import Batch, concatenate, output_of
from dynamics.engine.arguments import named
from dynamics.measures import LogitMeasure, Measure, at_target_pos, one_for_each_row
from dynamics.models.functional import call_with, eval_mode, is_bridge
from dynamics.recipe import Contrast, Recipe, RecipeError
from dynamics.sites import Site
from dynamics.steps.states import check_bridge, starting_point
from dynamics.steps.taps import Taps

T = TypeVar("T")
Activations = Mapping[str, Tensor]
"""By key: a submodule's name, with the number of the run from its second on."""

ROWS = 128
"""Rows run at once at most, one contrast's always; fixed, so that the same call gives the same bits."""


@dataclass(frozen=True)
class FrozenModel:
    """A model with the parameters and buffers that it is measured with, which stay as they are.

    Attributes:
        model: the recipe's, or a copy of a bridge; never changed.
        step: of the checkpoint.
        parameters, buffers: those it is called with; None for a bridge, which is called as it stands.
        rng: what a measure draws from, anew each time.
    """

    model: nn.Module
    step: int
    parameters: Mapping[str, Tensor] | None
    buffers: Mapping[str, Tensor]
    rng: RngState | None

    @classmethod
    def of(cls, recipe: Recipe, checkpoint: Checkpoint | None) -> FrozenModel:
        """The checkpoint's tensors, copied; without one, those of the recipe's model as it stands.

        Raises:
            RecipeError: the checkpoint is of another model, or the model is a bridge.
        """
        if not is_bridge(recipe.model):
            state = starting_point(recipe, checkpoint)
            return cls(recipe.model, state.step, _own(state.parameters), state.buffers, state.rng)
        check_bridge(recipe.model, checkpoint)
        return cls(recipe.model, 0, None, {}, RngState.capture())

    @classmethod
    def of_pair(cls, recipe: Recipe, pair: CheckpointPair) -> tuple[FrozenModel, FrozenModel]:
        """The base and the source checkpoint's model; both draw the base's random numbers.

        Of a bridge, whose tensors cannot be replaced during a call, each is a copy that holds the checkpoint's.

        Raises:
            RecipeError: the checkpoints are of another model.
        """
        if not is_bridge(recipe.model):
            base, source = cls.of(recipe, pair.base), cls.of(recipe, pair.source)
            return base, replace(source, rng=base.rng)
        base, source = (
            cls(_bridge_with(recipe.model, c), c.step, None, {}, pair.base.rng)
            for c in (pair.base, pair.source)
        )
        return base, source

    def run(self, function: Callable[[nn.Module, Any], T], batch: Any) -> T:
        """function(model, batch) in eval mode."""
        with replayed(self.rng), eval_mode(self.model):
            if self.parameters is None:
                return function(self.model, batch)
            return call_with(function, self.model, {**self.parameters, **_own(self.buffers)}, batch)


def _bridge_with(bridge: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """A copy of a bridge with a checkpoint's tensors."""
    twin = copy.deepcopy(bridge)
    try:
        checkpoint.restore(twin)
    except ValueError as error:
        raise RecipeError(
            f"checkpoint {checkpoint.step} does not fit the recipe's bridge, which names tensors in its own way. "
            "Capture it of a bridge to the model of that step: Checkpoint.capture(dy.bridge(model, tokenizer))."
        ) from error
    return twin


@dataclass(frozen=True)
class MeasurePass:
    """Measures that one forward pass serves.

    Attributes:
        places: where they stand among all measures.
        names: theirs.
        of_logits: measures of the logits, which share the pass; or
        alone: one other measure, which runs the model itself.
    """

    places: list[int]
    names: list[str]
    of_logits: list[LogitMeasure]
    alone: Measure | None = None

    def __call__(self, model: nn.Module, batch: Any) -> list[Tensor]:
        """What each measure gives: [rows], or a scalar.

        Raises:
            MeasureError: it gives something else.
        """
        if self.alone is not None:
            return [one_for_each_row(self.names[0], self.alone(model, batch))]
        return self.read(output_of(model, batch), batch)

    def read(self, output: Any, batch: Batch) -> list[Tensor]:
        """The measures of the logits that the model has given."""
        logits = at_target_pos(output, batch)
        return [
            one_for_each_row(name, measure.from_logits(logits, batch))
            for name, measure in zip(self.names, self.of_logits, strict=True)
        ]


def measure_passes(by_name: Mapping[str, Measure]) -> list[MeasurePass]:
    """The passes that measures take: one for all measures of the logits, one for each other."""
    numbered = list(enumerate(by_name.items()))
    shared = [(i, name, m) for i, (name, m) in numbered if isinstance(m, LogitMeasure)]
    alone = [MeasurePass([i], [name], [], m) for i, (name, m) in numbered if not isinstance(m, LogitMeasure)]
    if not shared:
        return alone
    places, names, of_logits = map(list, zip(*shared, strict=True))
    return [MeasurePass(places, names, of_logits), *alone]


@dataclass(frozen=True)
class ContrastBatch:
    """Contrasts that are run as one batch.

    Attributes:
        members: their numbers.
        base, source: all their rows.
        rows: which of the rows are each member's.
        name: how errors name them.
    """

    members: list[int]
    base: Any
    source: Any
    rows: list[slice]
    name: str

    def means(self, values: Tensor) -> list[Tensor]:
        """Mean over each member's rows, in fp64."""
        if len(self.members) > 1 and (values.ndim != 1 or len(values) != self.rows[-1].stop):
            raise ValueError(
                f"a measure of the logits gave {tuple(values.shape)} for {self.rows[-1].stop} rows; expected one "
                "value for each row. Give a function (model, batch) -> scalar instead."
            )
        if len(self.members) == 1:
            return [values.double().mean()]
        return [values[rows].double().mean() for rows in self.rows]


def contrast_batches(
    contrasts: Sequence[Contrast], sites: Sequence[Site], one_pass: MeasurePass
) -> Iterator[ContrastBatch]:
    """Contrasts in their order, as many at a time as have batches of one shape and fit `ROWS`.

    Only a `Batch` whose measures read the logits row by row can be run with others, and only if no site
    cuts the axis of rows.
    """
    joinable = one_pass.alone is None and all(map(_takes_all_rows, sites))
    waiting: list[int] = []

    def joined() -> ContrastBatch:
        chosen = [contrasts[i] for i in waiting]
        name = named(contrasts, waiting[0])
        if len(chosen) == 1:
            return ContrastBatch(list(waiting), chosen[0].base, chosen[0].source, [slice(None)], name)
        stops = torch.tensor([len(c.base) for c in chosen]).cumsum(0).tolist()
        rows = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        base, source = concatenate([c.base for c in chosen]), concatenate([c.source for c in chosen])
        return ContrastBatch(list(waiting), base, source, rows, f"{name} and {len(chosen) - 1} more")

    for i, contrast in enumerate(contrasts):
        if waiting:
            before = contrasts[waiting[0]]
            alike = joinable and _shape(before) is not None and _shape(before) == _shape(contrast)
            if not alike or sum(len(contrasts[j].base) for j in (*waiting, i)) > ROWS:
                yield joined()
                waiting.clear()
        waiting.append(i)
    if waiting:
        yield joined()


def _shape(contrast: Contrast) -> tuple[Any, ...] | None:
    """What contrasts must share to be run together; None where they cannot be."""
    batches = contrast.base, contrast.source
    if not all(isinstance(b, Batch) for b in batches) or len(contrast.base) != len(contrast.source):
        return None
    columns = ("tokens", "distractors", "example_ids")
    return tuple(None if (c := getattr(b, n)) is None else c.shape[1:] for b in batches for n in columns)


def _takes_all_rows(site: Site) -> bool:
    """Whether no index of a site cuts axis 0."""
    return all(
        isinstance(index, EllipsisType) or (isinstance(index, tuple) and index[:1] in ((), (slice(None),)))
        for index in site.covers.values()
    )


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since a measure may write into what it is given."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def read_activations(
    frozen: FrozenModel, one_pass: MeasurePass, batch: Any, names: Sequence[str]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the measures of a pass give, and the activations of some submodules on the way, without a graph."""
    kept: dict[str, Tensor] = {}

    def change(name: str, key: str, activation: Tensor) -> Tensor:
        kept[key] = activation.detach().clone()
        return activation

    return measure_with_taps(frozen, one_pass, batch, Taps(names, change)), kept


def measure_with_taps(frozen: FrozenModel, one_pass: MeasurePass, batch: Any, taps: Taps) -> list[Tensor]:
    """What the measures of a pass give, with taps on the model, without a graph."""
    with torch.no_grad(), taps.attached(frozen.model):
        found = frozen.run(one_pass, batch)
        taps.forward_is_over()
    return found
