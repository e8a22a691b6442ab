"""Small results of made-up numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xarray as xr

from dynamics import results

SITES = {"site": ["embed", "L0H0", "L0H1"], "layer": [None, 0, 0], "head": [None, 0, 1]}
EXAMPLES = {"example": ["alias 17", "alias 4"], "integer": [11, 3], "set": ["Dt3", "Df4"]}


def build(seed: int = 0, **changes: Any) -> xr.Dataset:
    """A small result of three sites and two examples; `changes` replace arguments of `results.effects`."""
    rng = np.random.default_rng(seed)
    references = {name: rng.normal(size=2) for name in results.REFERENCES}
    arguments: dict[str, Any] = {
        "patched": rng.normal(size=(2, 3)),
        "references": references,
        "example_coords": EXAMPLES,
        "site_coords": SITES,
        "measure_names": None,
        "units": "logits",
        "provenance": json.dumps(
            {"seed": seed, "task": "alias", "versions": {"numpy": "2", "torch": str(seed)}}
        ),
    }
    return results.effects(**{**arguments, **changes})


def with_measures() -> xr.Dataset:
    rng = np.random.default_rng(3)
    return build(
        patched=rng.normal(size=(2, 2, 3)),
        references={"base": rng.normal(size=(2, 2)), "source": rng.normal(size=(2, 2))},
        measure_names=["logit", "probability"],
        units=["logits", "1"],
    )
