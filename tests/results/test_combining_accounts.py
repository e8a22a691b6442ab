"""Accounts of training as Datasets: joined where stretches meet, and one example less another."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from dynamics import results


def account(first: int, sources: list[str], value: list[float], seed: int = 0) -> xr.Dataset:
    """Of two steps, two sites and two examples."""
    rng = np.random.default_rng(seed)
    return results.account(
        attribution=rng.normal(size=(3, len(sources), 2, 2)),
        value=np.array(value)[:, None] + [0.0, 1.0],
        residual=rng.normal(size=(3, 2)),
        nodes=rng.integers(2, 9, size=(3, 2)),
        steps=[first, first + 1, first + 2],
        sources=sources,
        example_coords={"example": ["Dt3", "Df4"]},
        site_coords={"site": ["embed", "unembed"]},
        measure_names=None,
        units="logit",
        partition=True,
        provenance="{}",
    )


def test_a_source_that_a_stretch_did_not_meet_wrote_nothing_there():
    first = account(0, ["table", "before", "decay"], [0.0, 1.0, 2.0], 1)
    second = account(2, ["questions", "table", "before", "decay"], [2.0, 5.0, 4.0], 2)
    found = results.joined([first, second])
    assert list(found["step"].values) == [0, 1, 2, 3, 4]
    assert list(found["source"].values) == ["table", "questions", "before", "decay"]
    assert not found["attribution"].sel(source="questions", step=slice(0, 2)).any()
    for part, steps in ((first, [0, 1, 2]), (second, [3, 4])):
        ours = found.sel(step=steps, source=part["source"])
        for name in ("attribution", "value", "residual", "nodes"):
            xr.testing.assert_equal(ours[name], part[name].sel(step=steps))
    assert results.is_account(found)


@pytest.mark.parametrize(("first", "value"), [(3, [2.0, 5.0, 4.0]), (2, [2.1, 5.0, 4.0])])
def test_stretches_that_do_not_meet_are_refused(first, value):
    one = account(0, ["before", "decay"], [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match=f"ends at step 2 is followed by one that begins at step {first}"):
        results.joined([one, account(first, ["before", "decay"], value)])


def test_one_example_less_another_keeps_units_and_says_what_it_is():
    whole = account(0, ["before", "decay"], [0.0, 1.0, 2.0])
    found = results.difference(whole, "Dt3", "Df4")
    for name in ("attribution", "value", "residual"):
        np.testing.assert_array_equal(
            found[name], whole[name].sel(example="Dt3") - whole[name].sel(example="Df4")
        )
        assert found[name].attrs == whole[name].attrs
    np.testing.assert_array_equal(found["nodes"], whole["nodes"].max("example"))
    assert found["example"].item() == "Dt3 − Df4"
    assert found.attrs == whole.attrs
