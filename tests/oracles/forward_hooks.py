"""Runs with activations exchanged by a forward hook written for the purpose, and small tokenizers."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynamics.trees import Index

Measure = Callable[[nn.Module, Any], Tensor]


def outputs_of(model: nn.Module, batch: Any, measure: Measure, names: list[str]) -> dict[str, list[Tensor]]:
    """Every output of some submodules while the measure is taken, on a copy in eval mode."""
    twin, kept = copy.deepcopy(model).eval(), defaultdict(list)
    for name in names:
        twin.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: kept[name].append(first(output).detach().clone())
        )
    with torch.no_grad():
        measure(twin, batch)
    return dict(kept)


def patched_by_hand(
    model: nn.Module,
    batch: Any,
    measure: Measure,
    covers: Mapping[str, Index],
    values: Mapping[str, list[Tensor]],
) -> float:
    """The mean measure of a batch with the given values on some slices of some submodules' outputs."""
    twin, runs = copy.deepcopy(model).eval(), defaultdict(int)

    def replace(name: str, output: Any) -> Any:
        patched = first(output).clone()
        patched[covers[name]] = values[name][runs[name]][covers[name]]
        runs[name] += 1
        return patched if isinstance(output, Tensor) else (patched, *output[1:])

    for name in covers:
        twin.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: replace(name, output)
        )
    with torch.no_grad():
        return float(measure(twin, batch).mean())


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
