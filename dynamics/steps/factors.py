"""The two factors of a gradient: what each projection read, x, and the backward signal δ at what it wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from checkpoints import Checkpoint
from dynamics.models.projections import ITSELF, Projection, first_tensor, projections
from dynamics.recipe import Recipe
from dynamics.sites import SiteError
from dynamics.steps.gradients import StepGradient, gradient
from dynamics.steps.taps import Cache, reading, runs_of


class Call(NamedTuple):
    """One run of a module: its arguments, the random numbers it began with, and autocast's dtype if it was on."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    rng: Tensor
    autocast: torch.dtype | None


@dataclass(frozen=True)
class Factors:
    """One run's factors.

    Attributes:
        step: the run's loss and gradient, of which they are factors.
        written: activations and signals of what projections wrote, before hooks of the user's change it.
        read: submodule name -> its output at each of its runs, for those whose output a projection reads.
        calls: module name -> each of its runs, its arguments detached.
    """

    step: StepGradient
    written: Cache
    read: Mapping[str, list[Tensor]]
    calls: Mapping[str, list[Call]]


def factors(recipe: Recipe, checkpoint: Checkpoint, batch: Any, where: str = "the batch") -> Factors:
    """Gradient of a batch at a checkpoint, and the factors it is made of."""
    used = projections(recipe.model)
    written = Cache()
    taps = reading(sorted({_inner(owner, p.writes) for owner, p in used}), written, raw=True)
    inner = {_inner(owner, p.reads) for owner, p in used if p.reads != ITSELF}
    with _kept(recipe.model, {owner for owner, _ in used}, inner) as (calls, read):
        step = gradient(recipe, checkpoint, batch, where, taps)
    return Factors(step, written, read, calls)


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
            runs_of(delta.written.signals, _inner(owner, projection.writes)),
        )
        if len(reads) != len(signals):
            raise SiteError(
                f"{owner!r} runs {len(reads)} times in one run and {len(signals)} times in the other."
            )
        for call, signal in zip(reads, signals, strict=True):
            parameters = {n: checkpoint.parameters[c].detach().requires_grad_() for n, c in held.items()}
            buffers = {n: checkpoint.buffers[_inner(owner, n)].clone() for n, _ in module.named_buffers()}
            found = _local(owner, module, projection, parameters, buffers, call, signal, positions)
            for name, share in zip(held.values(), found, strict=True):
                if share is not None and name in wanted:
                    total[name] = total[name] + share if name in total else share
    return total


def check_complete(recipe: Recipe, checkpoint: Checkpoint, run: Factors, wanted: Collection[str]) -> None:
    """Raise a SiteError unless a run's factors make up its gradient for the wanted parameters."""
    rebuilt = crossed(recipe, checkpoint, run, run, wanted)
    present = [g.to_dense() for g in run.step.gradients.values() if g is not None]
    lowered = {call.autocast for calls in run.calls.values() for call in calls} - {None}
    eps = max(torch.finfo(dtype).eps for dtype in (*lowered, *(g.dtype for g in present)) if dtype)
    share = 10 * eps if lowered else 1000 * eps
    rounding = eps * max((float(g.norm()) for g in present), default=0.0)
    for name in wanted:
        gradient = run.step.gradients[name]
        if gradient is None:
            continue
        if name not in rebuilt:
            raise SiteError(
                f"{name!r} belongs to no projection that ran, so its gradient has no factors: its module holds "
                "parameters beside submodules of its own. Let the module declare them in a method projections() "
                "(see dynamics.models.projections)."
            )
        dense = gradient.to_dense()
        if float((rebuilt[name].to_dense() - dense).norm()) > share * float(dense.norm()) + rounding:
            raise SiteError(
                f"the factors of {name!r} do not make up its gradient: it is used where its module is not called, "
                "or the loss reads more of its module's output than the first tensor."
            )


def _local(
    owner: str,
    module: nn.Module,
    projection: Projection,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    call: Call,
    signal: Tensor,
    positions: Sequence[int] | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of one run of a projection: what is written, pulled back to the parameters."""
    if positions is not None and isinstance(module, MIXING):
        raise SiteError(_MIXES.format(owner))
    arguments, keywords = call.arguments, call.keywords
    inputs: list[Tensor] = []
    if positions is not None:
        arguments, keywords = tree_map_only(Tensor, lambda t: _leaf(t, inputs), (arguments, keywords))
    lowered = torch.autocast(signal.device.type, dtype=call.autocast, enabled=call.autocast is not None)
    with torch.enable_grad(), _drawing_from(call.rng), lowered:
        written = first_tensor(projection.apply({**parameters, **buffers}, *arguments, **keywords))
    if written.shape != signal.shape:
        raise SiteError(
            f"{owner!r} writes {tuple(written.shape)} in one run and {tuple(signal.shape)} in the other. Factors "
            "are exchanged between batches of one shape; pad them."
        )
    kept = signal if positions is None else _only(signal, positions, owner)
    found = torch.autograd.grad(written, [*parameters.values(), *inputs], kept, allow_unused=True)
    for read in found[len(parameters) :]:
        if read is not None and (read.ndim < 2 or bool(_without(read, positions or ()).any())):
            raise SiteError(_MIXES.format(owner))
    return found[: len(parameters)]


MIXING = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_MIXES = (
    "{!r} mixes positions, so its parameters' gradient is no sum over them. Leave out positions, or let the module "
    "declare projections() that work on each position by itself."
)


@contextmanager
def _drawing_from(state: Tensor) -> Iterator[None]:
    """Torch's CPU generator in the given state inside, and as it was afterwards."""
    before = torch.get_rng_state()
    try:
        torch.set_rng_state(state)
        yield
    finally:
        torch.set_rng_state(before)


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


def _reads(run: Factors, owner: str, projection: Projection) -> list[Call]:
    calls = list(run.calls.get(owner, []))
    if projection.reads == ITSELF:
        return calls
    read = run.read.get(_inner(owner, projection.reads), [])
    return [call._replace(arguments=(x,), keywords={}) for call, x in zip(calls, read, strict=True)]


@contextmanager
def _kept(
    model: nn.Module, owners: Iterable[str], inner: Iterable[str]
) -> Iterator[tuple[dict[str, list[Call]], dict[str, list[Tensor]]]]:
    """Inside, the runs of the named owners and the outputs of the inner modules are collected."""
    calls: dict[str, list[Call]] = defaultdict(list)
    read: dict[str, list[Tensor]] = defaultdict(list)

    def keep_call(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        device = next((t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), "cpu")
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        calls[name].append(Call(args, kwargs, torch.get_rng_state(), dtype))

    def keep_output(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        read[name].append(first_tensor(output).detach().clone())

    handles = []
    try:
        for name in owners:
            hook = partial(keep_call, name)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for name in inner:
            handles.append(model.get_submodule(name).register_forward_hook(partial(keep_output, name)))
        yield calls, read
    finally:
        for handle in handles:
            handle.remove()
