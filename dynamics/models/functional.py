"""Functional calls: a model with other parameters and buffers in place of its own, left as it was."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

T = TypeVar("T")

_CONTAINERS = (list, dict, set, deque, defaultdict)
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


def is_bridge(model: nn.Module) -> bool:
    """Whether a model is TransformerLens's bridge to a Hugging Face model.

    A bridge has hook points under names that are no submodules, holds its parameters twice under some of
    them, and is ruined by `functional_call`.
    """
    return hasattr(model, "hook_dict") and hasattr(model, "original_model")


def refuse_bridge(model: nn.Module) -> None:
    """Raise a TypeError for a TransformerBridge, whose parameters cannot be replaced during a call."""
    if is_bridge(model):
        raise TypeError(
            "a TransformerBridge cannot be called with other tensors than its own. Give the verbs that take a step "
            "the Hugging Face model itself; patch_activations and attribute_activations take a bridge as it stands "
            "(checkpoint=None)."
        )


class _Bound(nn.Module):
    """A function (model, batch) as a module, so that the model's tensors can be replaced during the call."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)


def call_with(
    function: Callable[[nn.Module, Any], T], model: nn.Module, tensors: Mapping[str, Tensor], batch: Any
) -> T:
    """function(model, batch) with the model's parameters and buffers replaced by `tensors`.

    The function may call the model any number of times. Buffers that the model writes to are written in
    `tensors`; the model keeps its own.

    Raises:
        TypeError: the model is a TransformerBridge, whose parameters this would corrupt without a word.
    """
    refuse_bridge(model)
    replaced = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return functional_call(_Bound(model, function), replaced, (batch,))  # type: ignore[no-any-return]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode inside, each in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        if any(modes.values()):
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.training = training


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` is plain products and a softmax, for which vmap has rules: it has none
    for the fused kernels, and would call them in a loop."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def attributes_restored(module: nn.Module) -> Iterator[None]:
    """Afterwards every attribute of every submodule is what it was, parameters, buffers and hooks aside.

    Lists, dicts and sets hold what they held, however deep, and tensors their values. Other objects are
    the same, but may have changed inside.
    """
    model_state = {id(t) for t in (*module.parameters(), *module.buffers())}
    containers: dict[int, tuple[Any, Any]] = {}
    clones: dict[int, Tensor] = {}

    def look_into(value: Any) -> None:
        if type(value) in _CONTAINERS and id(value) not in containers:
            items = value.values() if isinstance(value, dict) else value
            containers[id(value)] = value, dict(value) if isinstance(value, dict) else list(value)
            for item in items:
                look_into(item)

    def kept(value: Any) -> Any:
        look_into(value)
        if isinstance(value, Tensor) and not value.requires_grad and id(value) not in model_state:
            return clones.setdefault(id(value), value.clone())
        return value

    before = [
        (vars(part), {name: kept(value) for name, value in vars(part).items() if name not in _OF_TORCH})
        for part in module.modules()
    ]
    try:
        yield
    finally:
        for container, items in containers.values():
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(items)
        for attributes, known in before:
            for name in attributes.keys() - known.keys() - _OF_TORCH:
                del attributes[name]
            attributes.update(known)
