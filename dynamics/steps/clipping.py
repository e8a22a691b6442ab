"""Clipping a step's gradient by norm, by value, or not at all."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator

from torch import Tensor

from dynamics.recipe import ByNorm, ByValue, Clip
from dynamics.trees import Gradients, squared_norm


def coefficient(total_squared_norm: float, max_norm: float) -> float:
    """min(1, τ / (N + 1e-6)), the factor of `torch.nn.utils.clip_grad_norm_`; N² is given."""
    return min(1.0, max_norm / (math.sqrt(total_squared_norm) + 1e-6))


def counted(gradients: Gradients, clip: ByNorm, held: Container[str]) -> Iterator[Tensor | None]:
    """The gradients whose norm is taken: of all parameters, or of those that the optimizer holds."""
    return (g for name, g in gradients.items() if clip.over == "model" or name in held)


def clipped(gradients: Gradients, clip: Clip, held: Container[str]) -> dict[str, Tensor | None]:
    """The gradient as the optimizer sees it: of the parameters that it holds.

    By norm, N² = Σ ‖g‖² is added up in fp64 over the tensors in their order, never by subtraction, so that
    gradients which share tensors share their terms. Sparse gradients are scaled by norm; torch has no clamping
    of them by value.

    Args:
        gradients: by parameter name, None where there is none; of all parameters.
        clip: `ByNorm`, `ByValue` or None.
        held: names of the parameters that the optimizer holds.
    """
    ours = {name: g for name, g in gradients.items() if name in held}
    if clip is None:
        return ours
    if isinstance(clip, ByValue):
        return {n: None if g is None else g.clamp(-clip.limit, clip.limit) for n, g in ours.items()}
    assert isinstance(clip, ByNorm), f"unknown kind of clipping {clip!r}"
    factor = coefficient(sum(map(squared_norm, counted(gradients, clip, held))), clip.max_norm)
    return {n: None if g is None else g * factor for n, g in ours.items()}
