"""A checkpoint as the bytes of one HDF5 file, bit for bit.

A file reads like the model: `/parameters/blocks/0/attn/W_Q`, `/buffers/...`,
`/optimizer/state/blocks/0/attn/W_Q/exp_avg`, `/rng/...`, each a dataset of the tensor's own type with a
Fletcher-32 checksum (bfloat16 as the same bits in uint16; a 0-d tensor as one element; an empty one as it
is). `/index` is the checkpoint as JSON, every tensor replaced by its path, dtype and shape; it is what a
reader goes by. A tensor that lies in another file stands there by its checksum: see `checkpoints.shared`. The root
attribute `schema_version` says how to read it, `step` is there for browsing.

Reading trusts nothing: only hard links are followed, datasets with external or virtual storage and filters
other than the checksum are refused, and types, shapes and stored sizes are compared with the index before
any bytes are read. Nothing is ever unpickled.
"""

import io
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import h5py
import numpy as np
import torch
from torch import Tensor

from checkpoints import files, hdf5, values
from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import TrajectoryError
from checkpoints.optimizer import OptimizerState
from checkpoints.rng import RngState, as_value

SCHEMA_VERSION = 3  # 2: evaluating, scaler; 3: frozen, tensors in other files

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    )
}
_STORED_AS = {torch.bfloat16: torch.uint16}  # NumPy has no bfloat16


ReadShared = Callable[[str, int], bytes]
"""(checksum, size) -> the bytes of a tensor that lies in another file."""


def encode(checkpoint: Checkpoint, shared: Mapping[values.Path, str] | None = None) -> bytes:
    """The HDF5 file image of a checkpoint.

    Args:
        checkpoint: what to write.
        shared: the checksums of those tensors that lie in other files, by their paths in the checkpoint.

    Raises:
        TrajectoryError: something in it cannot be stored; the message names it.
    """
    document = _as_document(checkpoint)
    elsewhere = shared or {}
    found = [(path, tensor) for path, tensor in values.tensors(document) if path not in elsewhere]
    paths = _dataset_paths([path for path, _ in found])

    def reference(path: values.Path, tensor: Tensor) -> dict[str, Any]:
        place = {"shared": elsewhere[path]} if path in elsewhere else {"path": paths[path]}
        return {**place, "dtype": _dtype_name(path, tensor), "shape": list(tensor.shape)}

    index = json.dumps(values.to_json(document, reference), allow_nan=False).encode("ascii")
    name = uuid4().hex  # of no file, but HDF5 opens no two images of one name at a time
    with h5py.File(name, "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["step"] = checkpoint.step
        file.create_dataset("index", data=np.array([index]), chunks=(1,), fletcher32=True)
        groups = {"": file}
        for path, tensor in found:
            folder, _, leaf = paths[path].rpartition("/")
            if folder not in groups:
                groups[folder] = file.require_group(folder)
            _write_array(groups[folder], leaf, as_array(path, tensor))
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def _nowhere(digest: str, size: int) -> bytes:
    raise TrajectoryError(f"it names the shared tensor {digest}, which only its run's folder has")


def decode(image: bytes, origin: str = "the file", read_shared: ReadShared = _nowhere) -> Checkpoint:
    """The checkpoint in an HDF5 file image; its tensors are on the CPU.

    Args:
        image: the file's bytes.
        origin: what to call the file in messages.
        read_shared: reads the tensors that lie in other files.

    Raises:
        TrajectoryError: the file is no checkpoint, of a newer schema, damaged, or points outside itself.
    """
    with _opened(io.BytesIO(image), origin) as (nodes, index):
        document = values.from_json(index, lambda reference: _read_tensor(nodes, reference, read_shared))
        return _from_document(document)


def read_tensor(path: Path, name: str, kind: str, read_shared: ReadShared = _nowhere) -> Tensor:
    """One tensor of a checkpoint file, read without the others.

    Args:
        path: the file.
        name: the parameter's or buffer's name.
        kind: `parameters`, `buffers`, or what an optimizer keeps for a parameter, such as `exp_avg`.
        read_shared: as in `decode`.

    Raises:
        TrajectoryError: as `decode`, or there is no such tensor; the message lists those that are there.
    """
    with _opened(path, str(path)) as (nodes, index):
        if kind in ("parameters", "buffers"):
            offered = index[kind]
        else:
            states = index["optimizer"]["state"] if index["optimizer"] else {}
            offered = {owner: state[kind] for owner, state in states.items() if kind in state}
        if name not in offered or "$tensor" not in offered[name]:
            raise TrajectoryError(
                f"{path} has no tensor {name!r} of the kind {kind!r}; "
                f"it has {len(offered)} of that kind: {', '.join(list(offered)[:20])}"
            )
        return _read_tensor(nodes, offered[name]["$tensor"], read_shared)


def damaged(path: Path) -> list[str]:
    """The tensors of a damaged file whose own checksums no longer fit; none where its structure is damaged."""
    found: list[str] = []

    def tried(nodes: _Nodes, reference: dict[str, Any]) -> Tensor:
        try:
            if "path" in reference:
                _read_tensor(nodes, reference, _nowhere)
        except (OSError, TrajectoryError):
            found.append(str(reference["path"]))
        return torch.empty(0)

    try:
        with _opened(path, str(path)) as (nodes, index):
            values.from_json(index, lambda reference: tried(nodes, reference))
    except TrajectoryError:
        return []
    return found


def _as_document(checkpoint: Checkpoint) -> dict[str, Any]:
    optimizer = checkpoint.optimizer
    return {
        "step": checkpoint.step,
        "begins_optimizer": checkpoint.begins_optimizer,
        "parameters": checkpoint.parameters,
        "buffers": checkpoint.buffers,
        "optimizer": None if optimizer is None else {"groups": optimizer.groups, "state": optimizer.state},
        "scheduler": checkpoint.scheduler,
        "rng": as_value(checkpoint.rng),
        "fingerprint": checkpoint.fingerprint,
        "evaluating": checkpoint.evaluating,
        "frozen": checkpoint.frozen,
        "scaler": checkpoint.scaler,
    }


def _from_document(document: dict[str, Any]) -> Checkpoint:
    optimizer, rng = document.pop("optimizer"), document.pop("rng")
    return Checkpoint(
        **document,
        optimizer=None if optimizer is None else OptimizerState(**optimizer),
        rng=None if rng is None else RngState(**rng),
    )


def _dataset_paths(paths: Iterable[values.Path]) -> dict[values.Path, str]:
    """Where each tensor goes: dots become groups, except after a name that is itself a tensor's."""
    dotted = {path: ".".join(_quoted(part) for part in path) for path in paths}
    taken = set(dotted.values())
    if len(taken) != len(dotted):
        double = Counter(dotted.values()).most_common(1)[0][0]
        raise TrajectoryError(f"Two tensors would both be stored as {double}; rename one of them.")
    return {path: _split_outside(name, taken) for path, name in dotted.items()}


def _split_outside(name: str, taken: set[str]) -> str:
    path, so_far = "", ""
    for part in name.split("."):
        if so_far:
            path += "." if so_far in taken else "/"
        path += part or "%"
        so_far = f"{so_far}.{part}" if so_far else part
    return path


def _quoted(part: str) -> str:
    return re.sub(r"[%/\x00]", lambda match: f"%{ord(match[0]):02X}", part)


def _dtype_name(path: values.Path, tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
        raise TrajectoryError(
            f"{'/'.join(path)} is a {tensor.layout} {tensor.dtype} tensor on {tensor.device}, which "
            f"cannot be stored; expected a dense tensor of {', '.join(_DTYPES)}."
        )
    return name


def as_array(path: values.Path, tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as it is stored; a type that NumPy lacks as the same bits in one that it has.

    Raises:
        TrajectoryError: it cannot be stored; says where it is.
    """
    _dtype_name(path, tensor)
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    array: np.ndarray[Any, Any] = plain.view(_STORED_AS.get(plain.dtype, plain.dtype)).numpy()
    return array


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape or (1,)


def _write_array(group: h5py.Group, name: str, array: np.ndarray[Any, Any]) -> None:
    stored = array.reshape(_stored_shape(array.shape))
    if stored.size == 0:
        group.create_dataset(name, data=stored)  # no bytes to protect, and HDF5 cannot chunk them
    else:
        chunks = hdf5.chunks(stored.shape, stored.itemsize)
        group.create_dataset(name, data=stored, chunks=chunks, fletcher32=True)


_Nodes = dict[str, Any]
"""The groups and datasets of a file that were reached already, by path; the file itself is at ""."""


@contextmanager
def _opened(source: io.BytesIO | Path, origin: str) -> Iterator[tuple[_Nodes, dict[str, Any]]]:
    """The open file, as `_dataset` takes it, and its index; what is wrong with a file is a TrajectoryError."""
    try:
        with h5py.File(files.plain(source) if isinstance(source, Path) else source, "r") as file:
            version = int(file.attrs.get("schema_version", 0))
            if version < 1:
                raise TrajectoryError(f"{origin} is an HDF5 file but no checkpoint: it has no schema_version")
            if version > SCHEMA_VERSION:
                raise TrajectoryError(
                    f"{origin} has schema version {version}; this version reads up to {SCHEMA_VERSION}. "
                    "Update the package to read it."
                )
            nodes: _Nodes = {"": file}
            text = _dataset(nodes, "index")
            if text.dtype.kind != "S" or text.shape != (1,):
                raise TrajectoryError(
                    f"{origin} holds an index of {text.dtype} {text.shape}, expected one text"
                )
            yield nodes, json.loads(text[0])
    except TrajectoryError as error:
        message = str(error)
        raise TrajectoryError(message if origin in message else f"{origin}: {message}") from error
    except (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise TrajectoryError(f"{origin} is not a readable checkpoint: {error}") from error


def _dataset(nodes: _Nodes, path: str) -> h5py.Dataset:
    """The dataset at a path inside this very file, its bytes stored plainly in it."""
    node, so_far = nodes[""], ""
    for part in path.split("/"):
        if not isinstance(node, h5py.Group) or part in ("", ".", ".."):
            raise TrajectoryError(f"{path!r} is not a path to a dataset")
        so_far = f"{so_far}/{part}"
        if so_far not in nodes:
            nodes[so_far] = hdf5.member(node, part, path)
        node = nodes[so_far]
    if not isinstance(node, h5py.Dataset):
        raise TrajectoryError(f"{path!r} is a {type(node).__name__}, expected a dataset")
    hdf5.check_storage(node, path)
    if node.fletcher32 != bool(node.size):
        raise TrajectoryError(f"{path!r} has no checksum, expected its checksum alone")
    if node.dtype.hasobject:
        raise TrajectoryError(f"{path!r} is of type {node.dtype}, expected numbers")
    return node


def _read_tensor(nodes: _Nodes, reference: dict[str, Any], read_shared: ReadShared) -> Tensor:
    dtype, shape = _DTYPES[reference["dtype"]], tuple(map(operator.index, reference["shape"]))
    stored_as = _STORED_AS.get(dtype, dtype)
    expected = np.dtype(str(stored_as).removeprefix("torch."))
    if "shared" in reference:
        data = read_shared(reference["shared"], math.prod(shape) * expected.itemsize)
        array = np.frombuffer(data, expected.newbyteorder("<")).astype(expected)
        return torch.from_numpy(array).view(dtype).reshape(shape)
    path = reference["path"]
    dataset = _dataset(nodes, path)
    if dataset.dtype != expected or dataset.shape != _stored_shape(shape):
        raise TrajectoryError(
            f"{path!r} is {dataset.dtype} {dataset.shape}, "
            f"but the index says {expected} {_stored_shape(shape)}"
        )
    return torch.from_numpy(dataset[()]).view(dtype).reshape(shape)
