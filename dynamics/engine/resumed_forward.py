"""Resuming a forward pass: the cached prefix of a base model's pass serves all models that differ only after it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from checkpoints.rng import RngState
from checkpoints.values import differences

Forward = Callable[..., Any]


@dataclass(frozen=True)
class SubmoduleCall:
    """One run of a submodule.

    Attributes:
        name: the submodule's.
        start, end: when, among all calls and all reads of parameters and buffers.
        output: what it gave.
    """

    name: str
    start: int
    end: int
    output: Any


@dataclass(frozen=True)
class CachedPrefix:
    """A base model's forward pass, cached submodule by submodule.

    Attributes:
        calls: of submodules that have parameters, in the order in which they began.
        first_read: when each tensor was first used in a computation, whoever did so.
    """

    calls: list[SubmoduleCall]
    first_read: Mapping[str, int]

    @contextmanager
    def resumed(self, model: nn.Module, changed: Collection[str]) -> Iterator[None]:
        """Inside, submodules that are done before any of the changed tensors is read give what they gave.

        The same pass must be taken, with the same batch.

        Raises:
            LookupError: inside, where submodules are called in another order.
        """
        change = min((self.first_read[name] for name in changed if name in self.first_read), default=None)
        place = 0

        def around(name: str, forward: Forward) -> Forward:
            def run(*arguments: Any, **keywords: Any) -> Any:
                nonlocal place
                call = self.calls[place]
                if call.name != name:
                    raise LookupError(f"{name} runs where {call.name} did")
                place += 1
                if change is not None and call.end > change:
                    return forward(*arguments, **keywords)
                while place < len(self.calls) and self.calls[place].start < call.end:
                    place += 1  # runs inside the one that is not taken again
                return tree_map_only(Tensor, torch.clone, call.output)

            return run

        with _forwards(model, around):
            yield


def cache_prefix(
    run: Callable[[Mapping[str, Tensor]], Any],
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    n_bytes: int,
) -> CachedPrefix | None:
    """Take a forward pass and cache what its submodules give.

    Args:
        run: takes it, with the given tensors in place of the model's own.
        model: whose submodules are watched.
        tensors: parameters and buffers by name.
        n_bytes: how much may be kept.

    Raises:
        MemoryError: it would be more.

    Returns:
        None where parts of the pass cannot be left out: it draws random numbers, or writes into buffers,
        activations or parameters.
    """
    watch = _PassRecorder({id(tensor): name for name, tensor in tensors.items()}, n_bytes)
    watch.see(tensors)
    before = vars(RngState.capture())
    with torch.no_grad(), watch, _forwards(model, watch.around):
        run(tensors)
    drawn = differences(before, vars(RngState.capture()))
    if drawn or any(tensor._version != version for tensor, version in watch.seen):
        return None
    return CachedPrefix(sorted(watch.calls, key=lambda call: call.start), watch.first_read)


class _PassRecorder(TorchFunctionMode):
    """Records when each tensor is first read and when each submodule runs."""

    def __init__(self, names: Mapping[int, str], n_bytes: int) -> None:
        super().__init__()
        self.names = names
        self.n_bytes = n_bytes
        self.clock = 0
        self.calls: list[SubmoduleCall] = []
        self.first_read: dict[str, int] = {}
        self.seen: list[tuple[Tensor, int]] = []
        """What submodules were given and gave, with the number of writes into it so far."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if id(tensor) in self.names:
                self.first_read.setdefault(self.names[id(tensor)], self._now())
        return func(*args, **(kwargs or {}))

    def _now(self) -> int:
        self.clock += 1
        return self.clock

    def around(self, name: str, forward: Forward) -> Forward:
        def run(*arguments: Any, **keywords: Any) -> Any:
            call = SubmoduleCall(name, self._now(), 0, None)
            self.see((arguments, keywords))
            output = forward(*arguments, **keywords)
            self.n_bytes -= self.see(output)
            if self.n_bytes < 0:
                raise MemoryError("what submodules give is more than may be kept")
            self.calls.append(replace(call, end=self._now(), output=output))
            return output

        return run

    def see(self, values: Any) -> int:
        """Note tensors, and say how many bytes they have."""
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
        self.seen += [(x, x._version) for x in tensors]
        return sum(x.nbytes for x in tensors)


@contextmanager
def _forwards(model: nn.Module, around: Callable[[str, Forward], Forward]) -> Iterator[None]:
    """Inside, submodules that have parameters run what `around(name, forward)` makes of their forward."""
    owners = {
        name: module
        for name, module in model.named_modules()
        if name and next(module.parameters(), None) is not None
    }
    own = {name: vars(module).get("forward") for name, module in owners.items()}
    for name, module in owners.items():
        vars(module)["forward"] = around(name, module.forward)
    try:
        yield
    finally:
        for name, module in owners.items():
            if own[name] is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own[name]
