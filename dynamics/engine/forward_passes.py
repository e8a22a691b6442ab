"""Forward passes over many contrasts, with activations read or exchanged on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from checkpoints import Checkpoint
from checkpoints.rng import RngState, replayed
from dynamics.batch import Batch, concatenate
from dynamics.measures import LogitMeasure, Measure, at_target_pos
from dynamics.models.functional import call, evaluating, is_bridge
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site, SiteError
from dynamics.steps.states import check_bridge, starting_point
from dynamics.steps.taps import Cache, Taps, check_covers, runs_of

T = TypeVar("T")
Values = Literal["source", "zero", "mean"]
Activations = Mapping[str, Tensor]
"""By key: a submodule's name, with the number of the run from its second on."""

ROWS = 128
"""Rows run at once at most, one contrast's always; fixed, so that the same call gives the same bits."""


@dataclass(frozen=True)
class Standing:
    """A model with the tensors that are to be measured.

    Attributes:
        model: the recipe's; never changed.
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
    def of(cls, recipe: Recipe, checkpoint: Checkpoint | None) -> Standing:
        """The checkpoint's tensors, copied; without one, those of the recipe's model as it stands.

        Raises:
            RecipeError: the checkpoint is of another model, or the model is a bridge.
        """
        if not is_bridge(recipe.model):
            state = starting_point(recipe, checkpoint)
            return cls(recipe.model, state.step, _own(state.parameters), state.buffers, state.rng)
        check_bridge(recipe.model, checkpoint)
        return cls(recipe.model, 0, None, {}, RngState.capture())

    def run(self, function: Callable[[nn.Module, Any], T], batch: Any) -> T:
        """function(model, batch) in eval mode."""
        with replayed(self.rng), evaluating(self.model):
            if self.parameters is None:
                return function(self.model, batch)
            return call(function, self.model, {**self.parameters, **_own(self.buffers)}, batch)


@dataclass(frozen=True)
class Pass:
    """Measures that one forward pass serves.

    Attributes:
        places: where they stand among all measures.
        of_logits: measures of the logits, which share the pass; or
        alone: one other measure, which runs the model itself.
    """

    places: list[int]
    of_logits: list[LogitMeasure]
    alone: Measure | None = None

    def __call__(self, model: nn.Module, batch: Any) -> list[Tensor]:
        """What each measure gives: [rows], or a scalar."""
        if self.alone is not None:
            return [torch.as_tensor(self.alone(model, batch))]
        return self.read(model(batch.tokens), batch)

    def read(self, output: Any, batch: Batch) -> list[Tensor]:
        """The measures of the logits that the model has given."""
        logits = at_target_pos(output, batch)
        return [measure.from_logits(logits, batch) for measure in self.of_logits]


def passes(by_name: Mapping[str, Measure]) -> list[Pass]:
    """The passes that measures take: one for all measures of the logits, one for each other."""
    numbered = list(enumerate(by_name.values()))
    shared = [(i, m) for i, m in numbered if isinstance(m, LogitMeasure)]
    alone = [Pass([i], [], m) for i, m in numbered if not isinstance(m, LogitMeasure)]
    return [Pass([i for i, _ in shared], [m for _, m in shared]), *alone] if shared else alone


@dataclass(frozen=True)
class Pack:
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


def packed(contrasts: Sequence[Contrast], sites: Sequence[Site], one_pass: Pass) -> Iterator[Pack]:
    """Contrasts in their order, as many at a time as have batches of one shape and fit `ROWS`.

    Only a `Batch` whose measures read the logits row by row can be run with others, and only if no site
    cuts the axis of rows.
    """
    joinable = one_pass.alone is None and all(map(_takes_all_rows, sites))
    waiting: list[int] = []

    def pack() -> Pack:
        chosen = [contrasts[i] for i in waiting]
        name = str(chosen[0].coords.get("example", f"contrast {waiting[0]}"))
        if len(chosen) == 1:
            return Pack(list(waiting), chosen[0].base, chosen[0].source, [slice(None)], name)
        stops = torch.tensor([len(c.base) for c in chosen]).cumsum(0).tolist()
        rows = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        base, source = concatenate([c.base for c in chosen]), concatenate([c.source for c in chosen])
        return Pack(list(waiting), base, source, rows, f"{name} and {len(chosen) - 1} more")

    for i, contrast in enumerate(contrasts):
        if waiting:
            before = contrasts[waiting[0]]
            alike = joinable and _shape(before) is not None and _shape(before) == _shape(contrast)
            if not alike or sum(len(contrasts[j].base) for j in (*waiting, i)) > ROWS:
                yield pack()
                waiting.clear()
        waiting.append(i)
    if waiting:
        yield pack()


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


@dataclass(frozen=True)
class Exchange:
    """Both runs of a pack, and what the base run's activations are exchanged for.

    Attributes:
        base_values, source_values: what each measure of the pass gives.
        base: the base run's activations by key.
        new: what they are exchanged for.
    """

    pack: Pack
    base_values: list[Tensor]
    source_values: list[Tensor]
    base: Activations
    new: Activations


def exchanges(
    standing: Standing,
    one_pass: Pass,
    contrasts: Sequence[Contrast],
    sites: Sequence[Site],
    values: Values,
) -> Iterator[Exchange]:
    """The two runs of all contrasts, pack by pack, checked against the sites."""
    names = list(dict.fromkeys(name for site in sites for name in site.covers))
    packs = list(packed(contrasts, sites, one_pass))
    means = _means(standing, one_pass, packs, names) if values == "mean" else {}
    for pack in packs:
        base_values, base = read(standing, one_pass, pack.base, names)
        source_values, source = read(standing, one_pass, pack.source, names)
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
        yield Exchange(pack, base_values, source_values, base, new)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since a measure may write into what it is given."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


# --- activations ------------------------------------------------------------------------------------------


def read(
    standing: Standing, one_pass: Pass, batch: Any, names: Sequence[str]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the measures of a pass give, and the activations of some submodules on the way, without a graph."""
    kept: dict[str, Tensor] = {}

    def change(name: str, key: str, activation: Tensor) -> Tensor:
        kept[key] = activation.detach().clone()
        return activation

    return measured(standing, one_pass, batch, Taps(names, change)), kept


def measured(standing: Standing, one_pass: Pass, batch: Any, taps: Taps) -> list[Tensor]:
    """What the measures of a pass give, with taps on the model, without a graph."""
    with torch.no_grad(), taps.attached(standing.model):
        found = standing.run(one_pass, batch)
        taps.forward_is_over()
    return found


def exchanging(site: Site, values: Activations) -> Taps:
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
    standing: Standing, one_pass: Pass, packs: Sequence[Pack], names: Sequence[str]
) -> dict[str, Tensor]:
    """Mean of the source runs' activations over all rows of all contrasts: [1, ...] by key."""
    total: dict[str, Tensor] = {}
    n_rows = 0
    for pack in packs:
        kept = read(standing, one_pass, pack.source, names)[1]
        n_rows += len(next(iter(kept.values()), ()))
        for key, activation in kept.items():
            part = activation.double().sum(0, keepdim=True)
            _check_shapes(repr(key), total.setdefault(key, torch.zeros_like(part)), part, pack.name)
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
