"""Results on disk: netCDF files (HDF5 that h5py opens), written whole or not at all, checked before they are read.

Numbers carry Fletcher-32 checksums. Behind HDF5's own end, where other programs do not look, stands the SHA-256
of all before it; it is verified before HDF5 sees a byte. A file without it is of an older version, or was changed
by another program; the root attribute `results_schema` tells these apart.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import uuid
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import pandas as pd
import xarray as xr

from checkpoints import TrajectoryError, files, hdf5

SCHEMA_VERSION = 1
_SCHEMA = "results_schema"
_MARK = b"\nsha256 of all before: "
_SEAL_BYTES = len(_MARK) + 64 + 1
_UNCHECKED = (
    "%s is of an older version and carries no checksum: what it says is unchecked. Save it again to seal it."
)

logger = logging.getLogger(__name__)


class ResultsError(ValueError):
    """A file of results is damaged, no file of results, of a newer version, or points outside itself."""


def save(dataset: xr.Dataset, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write a dataset as netCDF (HDF5: h5py opens it), whole or not at all; its folder is made if absent.

    No fill values.

    Args:
        dataset: any whose attributes are strings, integers and floats.
        path: of the file.
        overwrite: replace a file of that name; it is there whole, old or new, at every moment.

    Raises:
        FileExistsError: there is a file already, and overwrite is not set.
        ValueError: a MultiIndex, or an attribute that is not a string, an integer or a float.
    """
    target = Path(path)
    _expect_storable(dataset)
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} exists; results are not overwritten unasked. Choose another name, move it, or give "
            "overwrite=True."
        )
    plain = dataset.drop_encoding().assign_attrs({_SCHEMA: SCHEMA_VERSION})
    encoding = {name: {"_FillValue": None, **_checksum(array)} for name, array in plain.variables.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(target, _sealed(_image(plain, encoding)))


def _image(dataset: xr.Dataset, encoding: dict[Hashable, dict[str, Any]]) -> bytes:
    """The bytes of its file, made in memory: HDF5 crashes the interpreter where a disk is full.

    Without xarray's lock, which among dask's workers knows no file that is not on a disk; h5py has its own.
    """
    memory = io.BytesIO()
    store = xr.backends.H5NetCDFStore.open(memory, mode="w", lock=False)
    try:
        dataset.dump_to_store(store, encoding=encoding)
    finally:
        store.close()
    return memory.getvalue()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary name beside a file, to write to; on the way out it is synced and takes the file's place.

    The file's folder is made if absent. Where writing fails nothing is left, and an older file stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with files.explained(target):
        try:
            yield temporary
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        files.sync_folder(target.parent)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a dataset into memory and close its file; identical to what was saved, attributes included.

    Raises:
        ResultsError: the file is damaged, no file of results, of a newer version, or points outside itself.
        OSError: there is no such file, or it may not be read.
    """
    if not verify(path):
        logger.warning(_UNCHECKED, path)
    with _named(path):
        dataset = xr.load_dataset(
            path, engine="h5netcdf", decode_times=False, decode_timedelta=False, mask_and_scale=False
        ).drop_encoding()
    dataset.attrs.pop(_SCHEMA, None)
    texts = {
        name: array.astype(np.str_) for name, array in dataset.variables.items() if array.dtype == object
    }
    return dataset.assign(texts) if texts else dataset


def verify(path: str | os.PathLike[str]) -> bool:
    """Whether a file carries its checksum (those of older versions do not); what is wrong with it is an error.

    Raises:
        ResultsError, OSError: as `load`.
    """
    file = Path(path)
    if file.exists() and not file.is_file():
        raise ResultsError(f"{path} is no plain file, so no file of results. Nothing of it was read.")
    sealed = _verify_seal(file)
    with _named(path), h5py.File(path, "r") as opened:
        hdf5.check_flat(opened)
        version = int(opened.attrs.get(_SCHEMA, [0])[0])
    if version > SCHEMA_VERSION:
        raise ResultsError(
            f"{path} has schema version {version}; this version reads up to {SCHEMA_VERSION}. "
            "Update the package to read it."
        )
    if version and not sealed:
        raise ResultsError(
            f"{path} has lost its checksum: it was cut short, or changed by another program. Restore it from a "
            "copy, or compute it again."
        )
    return sealed


def files_of(run: Path, under: str = "results") -> list[Path]:
    """Files of results in a run's folder, which a stranger may have made: a link that leads out of it is refused.

    Args:
        run: its folder.
        under: the folder in it that is looked through.

    Raises:
        ResultsError: names the link.
    """
    found = sorted((run / under).rglob("*.h5"))
    for path in found:
        if not path.resolve().is_relative_to(run.resolve()):
            raise ResultsError(
                f"{path} leads out of the run's folder, to {path.resolve()}. Nothing of it was read: name that "
                "file itself if it is meant."
            )
    return found


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with a file is a ResultsError that names it."""
    try:
        yield
    except TrajectoryError as error:
        raise ResultsError(f"{path} is refused: {error}. Nothing of it was read.") from error
    except (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is no readable file of results (netCDF, .h5): {error}") from error


def _checksum(array: xr.Variable) -> dict[str, Any]:
    """How a variable is stored so that HDF5 itself notices damage; texts and scalars it cannot protect."""
    if array.dtype.kind not in "biuf" or not array.ndim or not array.size:
        return {}
    return {"fletcher32": True, "chunksizes": hdf5.chunks(array.shape, array.dtype.itemsize)}


def _sealed(image: bytes) -> bytes:
    return image + _MARK + files.sha256(image).encode() + b"\n"


def _verify_seal(path: Path) -> bool:
    """Whether a file ends with a checksum; one that is not that of the file is an error."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size - _SEAL_BYTES
        file.seek(max(0, length))
        seal = file.read()
        if not seal.startswith(_MARK):
            return False
        file.seek(0)
        if seal != _MARK + _sha256(file, length).encode() + b"\n":
            raise ResultsError(
                f"{path} is damaged: its {length} bytes are not those that were written (their sha256 differs). "
                "Restore it from a copy, or delete it and compute it again."
            )
    return True


def _sha256(file: BinaryIO, length: int) -> str:
    """The checksum of a file's next bytes, read piece by piece."""
    found = hashlib.sha256()
    while length > 0 and (piece := file.read(min(length, 1 << 20))):
        found.update(piece)
        length -= len(piece)
    return found.hexdigest()


def _expect_storable(dataset: xr.Dataset) -> None:
    for name, index in dataset.indexes.items():
        if isinstance(index, pd.MultiIndex):
            raise ValueError(
                f"'{name}' is a MultiIndex, which no file holds; save reset_index('{name}') instead"
            )
    owners = {"the dataset": dataset.attrs} | {
        f"'{key}'": array.attrs for key, array in dataset.variables.items()
    }
    for owner, attrs in owners.items():
        for key, value in attrs.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float | np.integer | np.floating):
                raise ValueError(
                    f"attribute '{key}' of {owner} is {type(value).__name__}; expected a string, an integer "
                    "or a float. Put anything else into the JSON of provenance."
                )
