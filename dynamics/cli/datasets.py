"""Files of results: read, cut down to what `--at NAME=VALUE` asks for, told apart by what they hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dynamics.cli.parsing import CommandError, Parser
from dynamics.config.checks import did_you_mean

if TYPE_CHECKING:
    import xarray as xr


def add_at(parser: Parser) -> None:
    """Add the option `--at`."""
    parser.add_argument(
        "--at",
        type=str,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of a file: one value of a dim or coordinate, such as step=250 optimizer=fresh level=heads",
    )


def at(dataset: xr.Dataset, asked: Sequence[str]) -> xr.Dataset:
    """The part of a Dataset where dims or coordinates have the values asked for, as NAME=VALUE.

    Raises:
        CommandError: no such dim, coordinate or value; the message lists those there are.
    """
    for each in asked:
        name, _, value = each.partition("=")
        known = {str(key): coord for key, coord in dataset.coords.items() if coord.ndim == 1}
        if name not in known:
            listed = ", ".join(known)
            raise CommandError(
                f"--at {each}: no dim or coordinate {name!r}; there are {listed}.{did_you_mean(name, known)}"
            )
        (dim,) = known[name].dims
        labels = known[name].values.astype(str)
        if value not in labels:
            there = list(dict.fromkeys(labels.tolist()))
            raise CommandError(
                f"--at {each}: {name} has no {value!r}; it has {', '.join(there[:40])}."
                f"{did_you_mean(value, there)}"
            )
        dataset = dataset.isel({dim: np.flatnonzero(labels == value)})
    return dataset


def first_of_others(dataset: xr.Dataset, kept: Collection[str]) -> tuple[xr.Dataset, list[str]]:
    """The first value of every dim that is not kept, as a scalar; and in words what was chosen and could be."""
    words = []
    for dim in [str(dim) for dim in dataset.dims if dim not in kept]:
        labels = dataset[dim].values.astype(str).tolist() if dim in dataset.coords else ["0"]
        others = f" (or {', '.join(labels[1:])})" if labels[1:] else ""
        words.append(f"{dim}={labels[0]}{others}")
        dataset = dataset.isel({dim: 0})
    return dataset, words


def load(path: Path) -> xr.Dataset:
    """The Dataset in a file.

    Raises:
        CommandError: there is none.
    """
    from dynamics import results

    if not path.is_file():
        raise CommandError(f"there is no file {path}.")
    try:
        return results.load(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} is no file of results (netCDF, .h5): {error}") from error
