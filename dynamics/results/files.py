"""Results on disk: netCDF files (HDF5 that h5py opens), written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr


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
    plain = dataset.drop_encoding()
    encoding: dict[Hashable, dict[str, Any]] = {name: {"_FillValue": None} for name in plain.variables}
    with replacing(target) as temporary:
        plain.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary name beside a file, to write to; on the way out it is synced and takes the file's place.

    The file's folder is made if absent. Where writing fails nothing is left, and an older file stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(target.parent)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a dataset into memory and close its file; identical to what was saved, attributes included."""
    dataset = xr.load_dataset(
        path, engine="h5netcdf", decode_times=False, decode_timedelta=False, mask_and_scale=False
    ).drop_encoding()
    texts = {
        name: array.astype(np.str_) for name, array in dataset.variables.items() if array.dtype == object
    }
    return dataset.assign(texts) if texts else dataset


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


def _sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a loss of power."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle to sync on a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
