"""Calling a model with other tensors in place of its own, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

T = TypeVar("T")


def is_bridge(model: nn.Module) -> bool:
    """Whether a model is TransformerLens's bridge to a Hugging Face model.

    A bridge has hook points under names that are no submodules, holds its parameters twice under some of
    them, and is ruined by `functional_call`.
    """
    return hasattr(model, "hook_dict") and hasattr(model, "original_model")


class _Bound(nn.Module):
    """A function (model, batch) as a module, so that the model's tensors can be replaced during the call."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)


def call(
    function: Callable[[nn.Module, Any], T], model: nn.Module, tensors: Mapping[str, Tensor], batch: Any
) -> T:
    """function(model, batch) with the model's parameters and buffers replaced by `tensors`.

    The function may call the model any number of times. Buffers that the model writes to are written in
    `tensors`; the model keeps its own.

    Raises:
        TypeError: the model is a TransformerBridge, whose parameters this would corrupt without a word.
    """
    if is_bridge(model):
        raise TypeError(
            "a TransformerBridge cannot be called with other tensors than its own. Give the verbs that take a step "
            "the Hugging Face model itself; patch_activations and attribute_activations take a bridge as it stands "
            "(checkpoint=None)."
        )
    replaced = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_Bound(model, function), replaced, (batch,))  # type: ignore[no-any-return]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode inside, each in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.training = training
