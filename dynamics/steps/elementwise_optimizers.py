"""The step of AdamW, Adam and SGD as functions of the gradient: many gradients in one pass over a parameter.

These optimizers treat every element by itself, so θ' of many gradients is a handful of operations on [n, width]
blocks small enough to stay in the processor's cache. Nothing is written but θ': moments are not advanced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from dynamics.steps.stacks import Workspace
from dynamics.steps.worker_threads import GPU_BLOCK

BLOCK = 16384
"""Elements of a parameter taken at a time under 9 gradients or more; under n, so many times as n goes into 16. A
multiple of what a processor takes at once: bits do not depend on it."""

Moved = Callable[[slice, Tensor, Tensor, Tensor], None]
"""(elements of the flat parameter, gradient, scratch, out, each [n, width]) -> writes θ' into `out`, in the order
of operations that torch has."""


def unsupported(
    kind: type[Optimizer], group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor
) -> str | None:
    """Why the real optimizer has to take a parameter's step, in words; None where `rule` does.

    Args:
        kind: the optimizer's own class; subclasses may step otherwise.
        group: its hyperparameters.
        state: what is recorded of this parameter; empty where it never moved.
        parameter: θ, any shape.
    """
    if kind not in (Adam, AdamW, SGD):
        return f"{kind.__name__} is not AdamW, Adam or SGD"
    if parameter.dtype not in (torch.float32, torch.float64):
        return f"a parameter is {parameter.dtype}"
    if odd := [key for key in ("amsgrad", "maximize", "capturable", "differentiable") if group.get(key)]:
        return f"{kind.__name__} has {odd[0]}=True"
    if any(isinstance(value, Tensor) for value in (group["lr"], *group.get("betas", ()))):
        return f"a hyperparameter of {kind.__name__} is a tensor"
    if any(isinstance(value, Tensor) and value.is_sparse for value in state.values()):
        return f"the recorded state of {kind.__name__} is sparse"
    return None


def rule(kind: type[Optimizer], group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor) -> Moved:
    """How a parameter moves.

    Args:
        kind, group, state: as `unsupported`.
        theta: θ, flat.

    Source: Loshchilov & Hutter 2019 (AdamW), Kingma & Ba 2015 (Adam), `torch.optim.SGD`.
    """
    if kind is SGD:
        return _sgd(group, state, theta)
    return _adam(group, state, theta, decoupled=is_decoupled(kind, group))


def is_decoupled(kind: type[Optimizer], group: Mapping[str, Any]) -> bool:
    """Whether weight decay moves the parameters by itself (AdamW) or joins the gradient (L2)."""
    return bool(group.get("decoupled_weight_decay", kind is AdamW))


def _adam(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, decoupled: bool) -> Moved:
    """θ' = θ(1 − ηλ) − η m̂' / (√v̂' + ε); with L2 decay, λθ joins the gradient instead."""
    beta1, beta2 = group["betas"]
    lr, decay, eps = group["lr"], group["weight_decay"], group["eps"]
    t = float(state.get("step", 0)) + 1
    size, spread = lr / (1 - beta1**t), (1 - beta2**t) ** 0.5
    first, second = (
        state[key].reshape(-1) if key in state else torch.zeros_like(theta)
        for key in ("exp_avg", "exp_avg_sq")
    )

    def moved(at: slice, gradient: Tensor, scratch: Tensor, out: Tensor) -> None:
        start = theta[at]
        if decay and not decoupled:
            gradient = torch.add(gradient, start, alpha=decay)
        root = torch.addcmul(second[at] * beta2, gradient, gradient, value=1 - beta2, out=scratch)
        mean = torch.lerp(first[at], gradient, 1 - beta1, out=out)
        kept = start * (1 - lr * decay) if decoupled else start
        torch.addcdiv(kept, mean, root.sqrt_().div_(spread).add_(eps), value=-size, out=out)

    return moved


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor) -> Moved:
    """θ' = θ − ηd with decay, momentum, dampening and Nesterov's look ahead as torch has them."""
    lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
    recorded = state.get("momentum_buffer")
    buffer = None if recorded is None else recorded.reshape(-1)

    def moved(at: slice, gradient: Tensor, scratch: Tensor, out: Tensor) -> None:
        start = theta[at]
        direction = torch.add(gradient, start, alpha=decay) if decay else gradient
        if momentum:
            rolling = direction
            if buffer is not None:
                rolling = torch.add(buffer[at] * momentum, direction, alpha=1 - group["dampening"])
            direction = torch.add(direction, rolling, alpha=momentum) if group["nesterov"] else rolling
        torch.add(start, direction, alpha=-lr, out=out)

    return moved


def step_blocks(
    out: Tensor,
    moved: Moved,
    first: int,
    gradients: Sequence[Sequence[Tensor]],
    limit: float | None,
    scale: Tensor | None,
    space: Workspace,
) -> list[Callable[[], None]]:
    """θ' under each gradient, in blocks: what one of these functions writes, no other touches.

    Args:
        out: [n, size], contiguous; written by all of them together.
        moved: the rule of the flat parameter of which this is a part.
        first: where in it the part begins.
        gradients: n of them, or one where all are alike but for their scale; each as tensors that make up the part
            side by side.
        limit: what each element is clamped to (clipping by value); None leaves it.
        scale: [n], or [1], what each is multiplied by (clipping by norm); None for one.
        space: memory for what lies between, each thread's its own.
    """
    (n, size), flat = out.shape, [[g.detach().reshape(-1) for g in row] for row in gradients]
    width = BLOCK * max(1, 16 // n) if out.device.type == "cpu" else max(1, GPU_BLOCK // n)

    def step(begin: int) -> None:
        at, thread = slice(begin, min(begin + width, size)), get_ident()
        to = out[:, at]

        def between(use: str, rows: int) -> Tensor:
            return space.empty((thread, use), out, rows, to.shape[1])

        pieces = [piece for row in flat for piece in _covered(row, at)]
        if len(pieces) == 1:
            block = pieces[0][None]
        else:
            block = between("gradients", len(flat))
            torch.cat(pieces, out=block.view(-1))
        if limit is not None:
            block = block.clamp(-limit, limit)
        if scale is not None:
            block = torch.mul(block, scale[:, None], out=between("scaled", len(scale)))
        moved(slice(first + at.start, first + at.stop), block.expand(n, -1), between("scratch", n), to)

    return [partial(step, begin) for begin in range(0, size, width)]


def _covered(side_by_side: Sequence[Tensor], at: slice) -> Iterator[Tensor]:
    """What of flat tensors lies in a slice of all of them."""
    begin = 0
    for tensor in side_by_side:
        end = begin + len(tensor)
        if at.start <= begin and end <= at.stop:
            yield tensor
        elif begin < at.stop and at.start < end:
            yield tensor[max(0, at.start - begin) : at.stop - begin]
        begin = end
