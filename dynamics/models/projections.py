"""Projections: where a module's parameters meet an activation, so that their gradient has two factors.

The gradient of such parameters is made of what the projection read, x, and of the backward signal δ at what it
wrote: Σ δ xᵀ for a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynamics.models.functional import call_with

ITSELF = ""
"""The declaring module: its first argument is read, or its output written."""


@dataclass(frozen=True)
class Projection:
    """One use of parameters: written = apply(parameters, x).


    A module that holds parameters beside submodules of its own declares them in a method `projections()`.

    Attributes:
        parameters: names within the declaring module.
        apply: (parameters and buffers by name, x) -> output; linear in the parameters.
        reads: submodule of the declaring one whose output is x; `ITSELF` for the module's own arguments.
        writes: submodule whose output is the result; `ITSELF` for the module's own output.
    """

    parameters: tuple[str, ...]
    apply: Callable[..., Any]
    reads: str = ITSELF
    writes: str = ITSELF


def projections(model: nn.Module) -> list[tuple[str, Projection]]:
    """(module name, projection) of every module that declares some, or holds parameters and no submodules with any.

    Parameters that neither covers have none: a parameter of the model's root beside its layers, for example.
    """
    found: list[tuple[str, Projection]] = []
    for name, module in model.named_modules():
        own = tuple(n for n, _ in module.named_parameters(recurse=False))
        if declared := getattr(module, "projections", None):
            found += [(name, projection) for projection in declared()]
        elif own and not any(list(child.parameters()) for child in module.children()):
            found.append((name, Projection(own, _whole(module))))
    return found


def _whole(module: nn.Module) -> Callable[..., Any]:
    """The module's forward as a function of its parameters and buffers; hooks on the module are not called."""

    def apply(tensors: Mapping[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
        return call_with(
            lambda m, given: m.forward(*given[0], **given[1]), module, tensors, (arguments, keywords)
        )

    return apply


def first_tensor(value: Any) -> Tensor:
    """The first floating-point tensor of a module's output."""
    return next(t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point())
