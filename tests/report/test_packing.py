"""Datasets as JSON."""

import json

import numpy as np
import xarray as xr

from dynamics.report.packing import packed

DATASET = xr.Dataset(
    {
        "effect": (("step", "site"), [[1.0, np.nan], [np.inf, 0.12345678912]], {"units": "logit"}),
        "n": ("step", [3, 4]),
        "said": ("site", ["holds", 'a "quote"']),
    },
    {"step": [0, 10], "site": ["W_E", "W_U"], "layer": ("site", [-1, 2]), "measure": "kl"},
)


def test_every_number_stands_where_its_labels_say():
    found = packed(DATASET)
    assert found["dims"] == {"step": [0, 10], "site": ["W_E", "W_U"]}
    assert found["coords"] == {"layer": {"dim": "site", "values": [-1, 2]}}
    effect = found["variables"]["effect"]
    assert (effect["dims"], effect["units"]) == (["step", "site"], "logit")
    assert effect["values"] == [1.0, None, None, 0.1234568]
    assert found["variables"]["n"]["values"] == [3, 4]


def test_what_is_packed_is_strict_json_and_comes_back_the_same():
    found = packed(DATASET)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_dim_without_labels_is_counted():
    assert packed(xr.Dataset({"a": ("row", [5.0, 6.0])}))["dims"] == {"row": [0, 1]}
