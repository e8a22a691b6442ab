"""What a result says of itself: its units, its kind, its rows as a data frame."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr


def is_account(dataset: xr.Dataset) -> bool:
    """Whether a result is an account of training, with steps of its own."""
    return "partition" in dataset.attrs


def tidy(dataset: xr.Dataset) -> pd.DataFrame:
    """A result as a data frame: a row for each measure, example and site; a column for each variable and label."""
    return dataset.to_dataframe().reset_index()


def units(dataset: xr.Dataset, name: str) -> str:
    """The units of one variable: of its only or selected measure; "" where they are unknown or mixed."""
    array = dataset[name]
    if "units" in array.attrs:
        return str(array.attrs["units"])
    known = np.unique(array.coords["units"].values) if "units" in array.coords else np.array([])
    return str(known[0]) if known.size == 1 else ""
