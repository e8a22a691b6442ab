"""HDF5 from strangers: what a file may hold is checked before a number of it is read.

Checkpoints and files of results go through the same checks. Refused are links, external and virtual storage,
filters other than the checksum, types that point elsewhere, chunks and shapes beyond the file's own size, and
texts that share their bytes so as to fill the memory.
"""

import math

import h5py
import numpy as np

from checkpoints.errors import TrajectoryError

CHECKSUM = frozenset({h5py.h5z.FILTER_FLETCHER32})

_CHUNK_BYTES = 4 << 20
_TEXT_BYTES = 64 << 20  # as much as is read at once of texts whose lengths are not known yet
_SCALES = (
    "DIMENSION_LIST",
    "REFERENCE_LIST",
)  # netCDF's dims: references from one dataset of a file to another
_MAX_RANK = 32
_A_DIM_ALONE = b"This is a netCDF dimension but not a netCDF variable"


def chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Even slabs of about 4 MiB along the leading axes; small arrays are one chunk."""
    found = list(shape)
    for axis, length in enumerate(shape):
        row_bytes = itemsize * math.prod(shape[axis + 1 :])
        n_slabs = math.ceil(length / max(1, _CHUNK_BYTES // row_bytes))
        found[axis] = math.ceil(length / n_slabs)
        if found[axis] > 1:
            break
    return tuple(found)


def member(group: h5py.Group, name: str, path: str) -> h5py.Group | h5py.Dataset:
    """What a group holds by a name, if it lies in this very file.

    Raises:
        TrajectoryError: there is nothing, or a link.
    """
    link = group.get(name, getlink=True)
    if link is None:
        raise TrajectoryError(f"{path!r} is missing")
    if not isinstance(link, h5py.HardLink):
        raise TrajectoryError(f"{path!r} leads through a link to elsewhere; only hard links are followed")
    return group[name]


def check_storage(node: h5py.Dataset, path: str) -> None:
    """Refuse a dataset whose bytes are not all stored in its own file, plainly.

    Raises:
        TrajectoryError: says what was found.
    """
    properties, stored = node.id.get_create_plist(), node.id.get_storage_size()
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    if node.external or node.is_virtual:
        raise TrajectoryError(f"{path!r} keeps its data outside itself (external or virtual storage)")
    if not filters <= CHECKSUM:
        raise TrajectoryError(f"{path!r} has filters {sorted(filters)}, expected its checksum alone")
    element = node.id.get_type().get_size() if node.dtype.hasobject else node.dtype.itemsize
    chunk = element * math.prod(node.chunks or ()) if node.size else 0
    if stored < node.size * element or max(stored, chunk) > node.file.id.get_filesize():
        raise TrajectoryError(f"{path!r} holds fewer bytes than its shape {node.shape} needs")


def check_flat(file: h5py.File) -> None:
    """Refuse a file unless it is datasets of numbers and texts side by side, as netCDF lays them out.

    Raises:
        TrajectoryError: names the dataset or attribute, and says what was found.
    """
    left = file.id.get_filesize()
    for owner in ("", *file):
        node = member(file, owner, owner) if owner else file
        if owner:
            if not isinstance(node, h5py.Dataset):
                raise TrajectoryError(f"{owner!r} is a {type(node).__name__}, expected a dataset")
            if not _is_dim_alone(node):
                _check_type(node.dtype, owner)
                check_storage(node, owner)
                left -= _text_bytes(node, owner, left)
        for name in node.attrs:
            left -= _attribute_bytes(node, name, f"{owner}@{name}", left)


def _is_dim_alone(node: h5py.Dataset) -> bool:
    """Whether it is what netCDF writes for a dim without labels: a shape without a number, which nobody reads."""
    name = node.attrs.get_id("NAME") if "NAME" in node.attrs else None
    plain = name is not None and name.dtype.kind == "S" and name.shape == () and name.dtype.itemsize < 256
    return plain and bytes(node.attrs["NAME"]).startswith(_A_DIM_ALONE) and not node.id.get_storage_size()


def _check_type(dtype: np.dtype[np.generic], path: str) -> None:
    if dtype.kind not in "biufS" and h5py.check_string_dtype(dtype) is None:
        raise TrajectoryError(f"{path!r} is of type {dtype}, expected numbers or texts")


def _text_bytes(node: h5py.Dataset, path: str, limit: int) -> int:
    """How many bytes the texts of a dataset have, read a few at a time: each may be as long as the file."""
    if not node.dtype.hasobject or not node.size:
        return 0
    total, space = 0, node.id.get_space()
    places = np.indices(node.shape).reshape(len(node.shape), node.size).T
    at_once = max(1, _TEXT_BYTES // max(1, limit))
    for start in range(0, node.size, at_once):
        some = places[start : start + at_once]
        texts = np.empty(len(some), node.dtype)
        if node.shape:
            space.select_elements(some)
        node.id.read(h5py.h5s.create_simple((len(some),)), space, texts)
        total += sum(map(len, texts.tolist()))
        _check_text(total, path, limit)
    return total


def _attribute_bytes(node: h5py.Group | h5py.Dataset, name: str, path: str, limit: int) -> int:
    attribute = node.attrs.get_id(name)
    size, dtype = math.prod(attribute.shape or ()), attribute.dtype
    if attribute.get_storage_size() > limit or (dtype.hasobject and size > _MAX_RANK and name != _SCALES[1]):
        raise TrajectoryError(f"{path!r} holds more than a file of this size can")
    if name in _SCALES:
        return 0
    _check_type(dtype, path)
    if not dtype.hasobject:
        return 0
    if size != 1:
        raise TrajectoryError(f"{path!r} holds {size} texts, expected one")
    value = node.attrs[name]
    length = len(value if isinstance(value, str | bytes) else value[0])
    _check_text(length, path, limit)
    return length


def _check_text(length: int, path: str, limit: int) -> None:
    if length > limit:
        raise TrajectoryError(f"{path!r} holds texts that are longer together than the file")
