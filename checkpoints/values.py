"""Plain values that hold tensors: copied, moved, compared bit for bit, written as JSON.

A value is a tensor, None, a bool, int, float or str, or a dict, Counter, list or tuple of values. This is
what state dicts and configs are made of. JSON has no tuples, counters, integer keys or NaN: those become
objects with a single key that begins with `$`, and come back as what they were.
"""

import copy
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.errors import TrajectoryError

Path = tuple[str, ...]


def copied(value: Any) -> Any:
    """The same value with detached clones of its tensors, sharing no memory; NumPy scalars as Python's."""
    return _rebuilt(value, _copied_leaf)


def moved(value: Any, device: torch.device) -> Any:
    """The same value with its tensors on `device`."""
    return _rebuilt(value, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def _copied_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        whole = (
            leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf
        )  # of a DTensor, from all its devices
        return whole.detach().clone()
    return leaf.item() if isinstance(leaf, np.generic) else copy.deepcopy(leaf)


def _rebuilt(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, Counter):
        return Counter({key: _rebuilt(item, leaf) for key, item in value.items()})
    if isinstance(value, dict):
        return {key: _rebuilt(item, leaf) for key, item in value.items()}
    if isinstance(value, list):
        return [_rebuilt(item, leaf) for item in value]
    if isinstance(value, tuple):
        return tuple(_rebuilt(item, leaf) for item in value)
    return leaf(value)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit (NaN equals itself, 0.0 differs from -0.0)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.numel() == 0 or torch.equal(_bytes(one), _bytes(other.to(one.device)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def differences(one: Any, other: Any, path: Path = ()) -> list[str]:
    """Where two values are not bitwise equal, as paths such as `optimizer/state/embed.W_E/exp_avg`."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if same_bits(one, other) else ["/".join(path)]
    if type(one) is not type(other):
        return ["/".join(path)]
    if isinstance(one, dict):
        found = []
        for key in [*one, *(key for key in other if key not in one)]:
            inner = (*path, str(key))
            if key in one and key in other:
                found += differences(one[key], other[key], inner)
            else:
                found.append("/".join(inner))
        return found
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return ["/".join(path)]
        pairs = enumerate(zip(one, other, strict=True))
        return [name for i, (mine, theirs) in pairs for name in differences(mine, theirs, (*path, str(i)))]
    if isinstance(one, float):
        return [] if struct.pack("<d", one) == struct.pack("<d", other) else ["/".join(path)]
    return [] if one == other else ["/".join(path)]


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in a value with the keys and positions that lead to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, (*path, str(i)))


def no_tensors(path: Path, tensor: Tensor) -> Any:
    """For `to_json` where tensors have no place, as in a config."""
    raise TrajectoryError(
        f"{'/'.join(path)} is a tensor of shape {tuple(tensor.shape)}; only plain values can be stored "
        "there. Use tensor.tolist() or tensor.item()."
    )


def to_json(value: Any, tensor: Callable[[Path, Tensor], Any] = no_tensors, path: Path = ()) -> Any:
    """A value as what `json.dumps(..., allow_nan=False)` takes.

    Args:
        value: the value.
        tensor: (path, tensor) -> what stands for the tensor.
        path: where the value is, for messages.

    Raises:
        TrajectoryError: the value holds something that JSON cannot say; the message says where.
    """
    if isinstance(value, Tensor):
        return {"$tensor": tensor(path, value)}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": struct.pack(">d", value).hex()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [to_json(item, tensor, (*path, str(i))) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        entries = [(key, to_json(item, tensor, (*path, str(key)))) for key, item in value.items()]
        if isinstance(value, Counter):
            return {"$counter": [[to_json(key, path=path), item] for key, item in entries]}
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in entries):
            return dict(entries)
        return {"$items": [[to_json(key, path=path), item] for key, item in entries]}
    raise TrajectoryError(
        f"{'/'.join(path) or 'the value'} is a {type(value).__name__}, which cannot be stored. Expected "
        "None, bool, int, float, str, or dicts, lists and tuples of those; convert it first, as with str()."
    )


def from_json(document: Any, tensor: Callable[[Any], Tensor] | None = None) -> Any:
    """The value that `to_json` was given; `tensor` turns what stood for a tensor into the tensor.

    Raises:
        ValueError: the document holds a `$` object that `to_json` does not write.
    """
    if isinstance(document, list):
        return [from_json(item, tensor) for item in document]
    if not isinstance(document, dict):
        return document
    match list(document.items()):
        case [("$tensor", reference)] if tensor is not None:
            return tensor(reference)
        case [("$float", bits)]:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
        case [("$tuple", items)]:
            return tuple(from_json(items, tensor))
        case [("$counter", items)]:
            return Counter(dict(from_json(items, tensor)))
        case [("$items", items)]:
            return dict(from_json(items, tensor))
        case [(str(key), _)] if key.startswith("$"):
            raise ValueError(f"{key!r} has no meaning here")
    return {key: from_json(item, tensor) for key, item in document.items()}
