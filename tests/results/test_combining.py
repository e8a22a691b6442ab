"""Results joined along a new dim keep what they share, and nothing is filled in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from dynamics import results
from tests.zoo.small_results import EXAMPLES, SITES, build, with_measures


def test_concat_adds_the_new_dim_to_variables_and_not_to_site_coordinates() -> None:
    joined = results.concat([build(0), build(1)], "step", [0, 50])
    assert joined["base"].dims == ("step", "example")
    assert joined["head"].dims == joined["level"].dims == ("site",)
    assert joined["integer"].dims == ("example",)
    assert joined["step"].dtype == np.int64
    for step, seed in ((0, 0), (50, 1)):
        xr.testing.assert_equal(joined.sel(step=step).drop_vars("step"), build(seed))
    assert joined["effect"].attrs["units"] == "logits"


def test_concat_lets_examples_stand_for_other_integers_in_other_runs() -> None:
    other = build(1, example_coords={**EXAMPLES, "integer": [5, 9]})
    joined = results.concat([build(0), other], "seed", [0, 1])
    assert joined["integer"].dims == ("seed", "example")
    assert joined["integer"].values.tolist() == [[11, 3], [5, 9]]
    assert joined["set"].dims == ("example",)


def test_concat_keeps_the_provenance_that_all_datasets_share() -> None:
    joined = results.concat([build(0), build(1)], "optimizer", ["stored", "fresh"])
    assert json.loads(joined.attrs["provenance"]) == {"task": "alias", "versions": {"numpy": "2"}}


def test_concat_replaces_a_scalar_coordinate_of_the_same_name() -> None:
    parts = [build(i).assign_coords(step=i) for i in range(2)]
    assert results.concat(parts, "step", [10, 20])["step"].values.tolist() == [10, 20]


def test_a_concatenated_result_survives_its_file(tmp_path: Path) -> None:
    steps = [results.concat([build(i), build(i + 10)], "step", [0, 10]) for i in range(2)]
    joined = results.concat(steps, "optimizer", ["stored", "fresh"])
    results.save(joined, tmp_path / "both.h5")
    xr.testing.assert_identical(results.load(tmp_path / "both.h5"), joined)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (build(site_coords={**SITES, "site": ["embed", "L0H0", "L0H7"]}), "differs in 'site'"),
        (build().isel(example=[1, 0]), "differs in 'example'"),
        (build(site_coords={**SITES, "head": [None, 0, 5]}), "differs in 'head'"),
        (build(units="nats"), "nats"),
        (build().drop_vars("coasted"), "expected, as in the first"),
        (build().drop_vars("integer"), "has the coordinates"),
        (build().expand_dims(step=[1]), "has the dim 'step' already"),
    ],
)
def test_concat_refuses_what_it_would_have_to_fill_in(other: xr.Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        results.concat([build(), other], "step", [0, 1])


def test_concat_refuses_a_measure_that_changes_its_units() -> None:
    other = with_measures().assign_coords(units=("measure", ["logits", "nats"]))
    with pytest.raises(ValueError, match="differs in 'units'"):
        results.concat([with_measures(), other], "step", [0, 1])


def test_concat_wants_one_new_label_for_each_dataset_and_a_known_dim() -> None:
    with pytest.raises(ValueError, match="found 2 datasets and 1 values"):
        results.concat([build(), build()], "step", [0])
    with pytest.raises(ValueError, match=r"more than once: \[3\]"):
        results.concat([build(), build()], "step", [3, 3])
    with pytest.raises(ValueError, match="'time' is not a dim"):
        results.concat([build(), build()], "time", [0, 1])
