"""Clipping a step's gradient by norm, by value, or not at all."""

from __future__ import annotations

import math

from torch import Tensor

from dynamics.recipe import ByNorm, ByValue, Clip
from dynamics.trees import Gradients, squared_norm


def coefficient(total_squared_norm: float, max_norm: float) -> float:
    """min(1, τ / (N + 1e-6)), the factor of `torch.nn.utils.clip_grad_norm_`; N² is given."""
    return min(1.0, max_norm / (math.sqrt(total_squared_norm) + 1e-6))


def clipped(gradients: Gradients, clip: Clip) -> dict[str, Tensor | None]:
    """The gradient as the optimizer sees it.

    By norm, N² = Σ ‖g‖² is added up in fp64 over the tensors in their order, never by subtraction, so that
    gradients which share tensors share their terms. Sparse gradients are scaled by norm; torch has no clamping
    of them by value.

    Args:
        gradients: by parameter name, None where there is none; only the optimizer's own parameters.
        clip: `ByNorm`, `ByValue` or None.
    """
    if clip is None:
        return dict(gradients)
    if isinstance(clip, ByValue):
        return {n: None if g is None else g.clamp(-clip.limit, clip.limit) for n, g in gradients.items()}
    assert isinstance(clip, ByNorm), f"unknown kind of clipping {clip!r}"
    factor = coefficient(sum(squared_norm(g) for g in gradients.values()), clip.max_norm)
    return {n: None if g is None else g * factor for n, g in gradients.items()}
