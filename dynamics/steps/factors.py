"""The two factors of a gradient: what each projection read, x, and the backward signal δ at what it wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from checkpoints import Checkpoint
from dynamics.projections import ITSELF, Projection, first_tensor, projections
from dynamics.recipe import Recipe
from dynamics.sites import SiteError
from dynamics.steps.caching import recorded
from dynamics.steps.gradients import StepGradient
from dynamics.steps.taps import Cache

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of one run of a module."""


@dataclass(frozen=True)
class Factors:
    """One run's factors.

    Attributes:
        step: the run's loss and gradient, of which they are factors.
        cache: activations and signals of what projections read and wrote.
        arguments: module name -> the arguments of each of its runs, detached.
        autocast: dtype the run computed in under autocast; None without.
    """

    step: StepGradient
    cache: Cache
    arguments: Mapping[str, list[Call]]
    autocast: torch.dtype | None


def factors(recipe: Recipe, checkpoint: Checkpoint, batch: Any, where: str = "the batch") -> Factors:
    """Gradient of a batch at a checkpoint, and the factors it is made of."""
    used = projections(recipe.model)
    hooks = {_inner(owner, p.writes) for owner, p in used}
    hooks |= {_inner(owner, p.reads) for owner, p in used if p.reads != ITSELF}
    owners = {owner for owner, p in used if p.reads == ITSELF}
    with _arguments_kept(recipe.model, owners) as (arguments, autocast):
        step, cache = recorded(recipe, checkpoint, batch, sorted(hooks), where)
    return Factors(step, cache, arguments, next(iter(autocast), None))


def crossed(
    recipe: Recipe,
    checkpoint: Checkpoint,
    x: Factors,
    delta: Factors,
    wanted: Collection[str],
    positions: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Gradients made of what one run read and of another run's signals: Σ δ xᵀ, over some positions.

    With x and delta of one run and all positions it is that run's own gradient, up to rounding.

    Args:
        recipe, checkpoint: model and parameter values.
        x, delta: the runs that the two factors come from.
        wanted: parameter names.
        positions: along axis 1 of what is written; None for all.

    Returns:
        Gradient by parameter name; a wanted parameter without a projection is left out.

    Raises:
        SiteError: the runs differ in shape, or positions are asked of a module that mixes them.
    """
    canonical = {id(p): name for name, p in recipe.model.named_parameters()}
    total: dict[str, Tensor] = {}
    for owner, projection in projections(recipe.model):
        module = recipe.model.get_submodule(owner)
        held = {n: canonical[id(p)] for n in projection.parameters if (p := getattr(module, n)) is not None}
        if not set(held.values()) & set(wanted):
            continue
        reads, signals = (
            _reads(x, owner, projection),
            _runs(delta.cache.signals, _inner(owner, projection.writes)),
        )
        if len(reads) != len(signals):
            raise SiteError(
                f"{owner!r} runs {len(reads)} times in one run and {len(signals)} times in the other."
            )
        for call, signal in zip(reads, signals, strict=True):
            parameters = {n: checkpoint.parameters[c].detach().requires_grad_() for n, c in held.items()}
            found = _local(owner, projection, parameters, call, signal, positions, x.autocast)
            for name, gradient in zip(held.values(), found, strict=True):
                if gradient is not None and name in wanted:
                    total[name] = total[name] + gradient if name in total else gradient
    return total


def check_complete(recipe: Recipe, checkpoint: Checkpoint, run: Factors, wanted: Collection[str]) -> None:
    """Raise a SiteError unless a run's factors make up its gradient for the wanted parameters."""
    rebuilt = crossed(recipe, checkpoint, run, run, wanted)
    present = [g for g in run.step.gradients.values() if g is not None]
    coarsest = max(torch.finfo(dtype).eps for dtype in (run.autocast, *(g.dtype for g in present)) if dtype)
    tolerance = 10 * coarsest**0.75 * max((float(g.abs().max()) for g in present), default=0.0)
    for name in wanted:
        gradient = run.step.gradients[name]
        if gradient is None:
            continue
        if name not in rebuilt:
            raise SiteError(
                f"{name!r} belongs to no projection that ran, so its gradient has no factors: its module holds "
                "parameters beside submodules of its own. Let the module declare them in a method projections() "
                "(see dynamics.projections)."
            )
        if float((rebuilt[name] - gradient).abs().max()) > tolerance:
            raise SiteError(
                f"the factors of {name!r} do not make up its gradient: it is used where its module is not called, "
                "or the loss reads more of its module's output than the first tensor."
            )


def _local(
    owner: str,
    projection: Projection,
    parameters: Mapping[str, Tensor],
    call: Call,
    signal: Tensor,
    positions: Sequence[int] | None,
    autocast: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of one run of a projection: what is written, pulled back to the parameters."""
    arguments, keywords = call
    inputs: list[Tensor] = []
    if positions is not None:
        arguments, keywords = tree_map_only(Tensor, lambda t: _leaf(t, inputs), (arguments, keywords))
    with (
        torch.enable_grad(),
        torch.autocast(signal.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        written = first_tensor(projection.apply(parameters, *arguments, **keywords))
    if written.shape != signal.shape:
        raise SiteError(
            f"{owner!r} writes {tuple(written.shape)} in one run and {tuple(signal.shape)} in the other. Factors "
            "are exchanged between batches of one shape; pad them."
        )
    kept = signal if positions is None else _only(signal, positions, owner)
    found = torch.autograd.grad(written, [*parameters.values(), *inputs], kept, allow_unused=True)
    for read in found[len(parameters) :]:
        if read is not None and (read.ndim < 2 or bool(_without(read, positions or ()).any())):
            raise SiteError(
                f"{owner!r} mixes positions, so its parameters' gradient is no sum over them. Leave out positions, "
                "or let the module declare projections() that work on each position by itself."
            )
    return found[: len(parameters)]


def _leaf(tensor: Tensor, kept: list[Tensor]) -> Tensor:
    """The tensor, of whose gradient it is kept where it can have one."""
    if not tensor.is_floating_point():
        return tensor
    kept.append(tensor.detach().requires_grad_())
    return kept[-1]


def _only(signal: Tensor, positions: Sequence[int], owner: str) -> Tensor:
    """The signal at some positions, zero elsewhere."""
    if signal.ndim < 3 or any(not -signal.shape[1] <= p < signal.shape[1] for p in positions):
        raise SiteError(f"positions {list(positions)} of {owner!r}: it writes {tuple(signal.shape)}.")
    kept = torch.zeros_like(signal)
    kept[:, list(positions)] = signal[:, list(positions)]
    return kept


def _without(tensor: Tensor, positions: Sequence[int]) -> Tensor:
    rest = tensor.clone()
    rest[:, list(positions)] = 0
    return rest


def _inner(owner: str, name: str) -> str:
    return ".".join(part for part in (owner, name) if part)


def _runs(kept: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """What was kept of a submodule, run by run."""
    keys = (f"{name}[{n}]" if n else name for n in count())
    return [kept[key] for key in takewhile(kept.__contains__, keys)]


def _reads(run: Factors, owner: str, projection: Projection) -> list[Call]:
    if projection.reads == ITSELF:
        return list(run.arguments.get(owner, []))
    return [
        ((activation,), {}) for activation in _runs(run.cache.activations, _inner(owner, projection.reads))
    ]


@contextmanager
def _arguments_kept(
    model: nn.Module, names: Iterable[str]
) -> Iterator[tuple[dict[str, list[Call]], set[torch.dtype]]]:
    """Inside, the arguments of each run of the named modules, and the dtypes of autocast, are collected."""
    arguments: dict[str, list[Call]] = defaultdict(list)
    autocast: set[torch.dtype] = set()
    handles = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            arguments[name].append(tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs)))
            device = next(
                (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), torch.empty(0)
            ).device
            if torch.is_autocast_enabled(device.type):
                autocast.add(torch.get_autocast_dtype(device.type))

        return hook

    try:
        for name in sorted(names):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hook_of(name), with_kwargs=True))
        yield arguments, autocast
    finally:
        for handle in handles:
            handle.remove()
