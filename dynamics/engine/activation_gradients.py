"""Gradients of a measure with respect to activations, and sums of their products with an exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dynamics.engine.activation_exchange import ActivationExchange
from dynamics.engine.forward_passes import Activations, ContrastBatch, FrozenModel, MeasurePass
from dynamics.steps import NonFiniteGradient
from dynamics.steps.taps import Taps, runs_of

Array = npt.NDArray[np.float64]

Elements = dict[str, Tensor]
"""Something for every element of the activations, by key: [rows, ...]."""


def gradients_at(
    frozen: FrozenModel, one_pass: MeasurePass, joined: ContrastBatch, names: Sequence[str], at: Activations
) -> list[Elements]:
    """For each measure of a pass its gradient with respect to activations; a row's mean is its contrast's.

    Args:
        names: submodules whose activations are meant.
        at: values that some of these take instead of their own, by key.
    """
    watched: dict[str, Tensor] = {}

    def change(name: str, key: str, activation: Tensor) -> Tensor:
        given = at.get(key, activation)
        watched[key] = given.clone() if given.requires_grad else given.detach().clone().requires_grad_()
        return watched[key].clone()  # what comes after may write into it

    taps = Taps(names, change)

    def run(model: nn.Module, batch: Any) -> list[Elements]:
        found = one_pass(model, batch)
        taps.forward_is_over()
        gradients = []
        for value in found:
            total = torch.stack(joined.means(value)).sum()
            if not total.requires_grad:
                raise ValueError(
                    "a measure has no gradient with respect to any of the activations, so nothing can be "
                    "attributed. Give one that can be differentiated, such as a logit; patch_activations takes any."
                )
            parts = torch.autograd.grad(total, list(watched.values()), allow_unused=True, retain_graph=True)
            gradients.append(
                {
                    key: torch.zeros_like(a) if g is None else g
                    for (key, a), g in zip(watched.items(), parts, strict=True)
                }
            )
        return gradients

    with torch.enable_grad(), taps.attached(frozen.model):
        gradients = frozen.run(run, joined.base)
    for key in watched:
        if not all(bool(torch.isfinite(of_measure[key]).all()) for of_measure in gradients):
            raise NonFiniteGradient(f"The gradient of a measure of {joined.name} at {key} is not finite.")
    return gradients


def differences(exchange: ActivationExchange, keys: Sequence[str]) -> Elements:
    """What is put in less what was there, in fp64; zero where they are equal, as at masked scores of −inf."""
    pairs = {key: (exchange.new[key].double(), exchange.base[key].double()) for key in keys}
    return {key: torch.where(new == old, 0.0, new - old) for key, (new, old) in pairs.items()}


def hooks_of(activations: Activations) -> list[str]:
    """Names of the submodules whose activations these are."""
    return [key for key in activations if not key.endswith("]")]


def keys_of(activations: Activations, name: str) -> list[str]:
    """Keys of all runs of a submodule."""
    return [f"{name}[{n}]" if n else name for n in range(len(runs_of(activations, name)))]


def by_member(joined: ContrastBatch, values: Sequence[Tensor]) -> Array:
    """Means of what measures gave: [n_measures, n_members]."""
    return np.array([[float(mean) for mean in joined.means(value)] for value in values])


def sums_by_member(
    joined: ContrastBatch, products: Sequence[Elements], summed: Callable[[Tensor], Tensor]
) -> Array:
    """Sums over all elements of each member's rows: [n_measures, n_members]."""
    return np.array(
        [
            [sum(float(summed(e[rows])) for e in elements.values()) for rows in joined.rows]
            for elements in products
        ]
    )


def sum_of_sizes(elements: Tensor) -> Tensor:
    """Σ |ΣA| over the first two axes, rows and positions."""
    return elements.reshape(*elements.shape[:2], -1).sum(-1).abs().sum()
