"""The step of AdamW, Adam and SGD as functions of the gradient: many gradients in one pass over a parameter.

These optimizers treat every element by itself, so θ' of many gradients is a handful of operations on [n, width]
blocks small enough to stay in the processor's cache. Nothing is written but θ': moments are not advanced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from dynamics.steps.stacks import Workspace

BLOCK = 16384
"""Elements of a parameter taken at a time under 9 gradients or more; under n, so many times as n goes into 16. A
multiple of what a processor takes at once: bits do not depend on it."""

Moved = Callable[[slice, Tensor, Tensor, Tensor, Tensor], None]
"""(elements of the flat parameter, gradient [n or 1, width], scale [n, 1], scratch, out, each [n, width]) -> writes
θ' under scale · gradient into `out`."""


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
    """θ' = θ(1 − ηλ) − η m̂' / (√v̂' + ε); with L2 decay, λθ joins the gradient instead.

    The corrections of both moments are taken out of the fraction, so that no element is divided by them:
    η m̂' / (√v̂' + ε) = η √(1 − β2ᵗ) / (1 − β1ᵗ) · m' / (√v' + ε √(1 − β2ᵗ)).
    """
    beta1, beta2 = group["betas"]
    lr, decay = group["lr"], group["weight_decay"]
    t = float(state.get("step", 0)) + 1
    spread = (1 - beta2**t) ** 0.5
    size, eps = lr * spread / (1 - beta1**t), group["eps"] * spread
    first, second = (
        state[key].reshape(-1) if key in state else torch.zeros_like(theta)
        for key in ("exp_avg", "exp_avg_sq")
    )

    def moved(at: slice, gradient: Tensor, scale: Tensor, scratch: Tensor, out: Tensor) -> None:
        start = theta[at]
        if decay and not decoupled:
            gradient = torch.mul(gradient, scale, out=scratch).add_(start, alpha=decay)
            scale = torch.ones_like(scale)
        mean = torch.addcmul(first[at] * beta1, gradient, scale * (1 - beta1), out=out)
        square = gradient.square() if len(gradient) < len(out) else torch.square(gradient, out=scratch)
        root = torch.addcmul(second[at] * beta2, square, scale.square() * (1 - beta2), out=scratch).sqrt_()
        kept = start * (1 - lr * decay) if decoupled else start
        torch.addcdiv(kept, mean, root.add_(eps), value=-size, out=out)

    return moved


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor) -> Moved:
    """θ' = θ − ηd with decay, momentum, dampening and Nesterov's look ahead as torch has them."""
    lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
    recorded = state.get("momentum_buffer")
    buffer = None if recorded is None else recorded.reshape(-1)

    def moved(at: slice, gradient: Tensor, scale: Tensor, scratch: Tensor, out: Tensor) -> None:
        start = theta[at]
        direction = torch.mul(gradient, scale, out=scratch)
        if decay:
            direction.add_(start, alpha=decay)
        if momentum:
            rolling = direction
            if buffer is not None:
                rolling = torch.add(buffer[at] * momentum, direction, alpha=1 - group["dampening"])
            direction = torch.add(direction, rolling, alpha=momentum) if group["nesterov"] else rolling
        torch.add(start, direction, alpha=-lr, out=out)

    return moved


def step_into(
    out: Tensor, moved: Moved, begin: int, gradients: Tensor, scale: Tensor, space: Workspace
) -> None:
    """Write θ' under each gradient, of a part of a flat parameter.

    Args:
        out: [n, size]; written.
        moved: the parameter's rule.
        begin: where the part begins.
        gradients: [n, size], or [1, size] where all are alike but for their scale.
        scale: [n], what each is multiplied by (clipping).
        space: memory for what lies between.
    """
    n, size = out.shape
    width = BLOCK * max(1, 16 // n)
    for first in range(0, size, width):
        part = slice(first, min(first + width, size))
        at = slice(begin + part.start, begin + part.stop)
        scratch = space.empty("scratch", out, n, part.stop - part.start)
        moved(at, gradients[:, part], scale[:, None], scratch, out[:, part])
