"""Planted truth, in miniature: every method scores every site; grades and their table by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from dynamics import results
from dynamics.sites import Site
from scripts.experiments import planted_truth
from tests.scripts.calling import call, forks_of, in_small, named, rows_of


@pytest.mark.slow
def test_a_planted_site_is_scored_by_every_method_in_every_run(alias_runs, tmp_path):
    for seed, run in zip((400, 401), alias_runs, strict=True):
        forks_of(tmp_path / "forks", run, seed)
    with in_small(planted_truth, WARM_UP=4, WINDOW=2, IMPULSE=1, PLANTS=("attn 0",)):
        printed = call(planted_truth, tmp_path / "forks", "--out", tmp_path / "planted")
        assert call(planted_truth, tmp_path / "forks", "--out", tmp_path / "planted") == printed
    for path in named(tmp_path / "planted" / "attn 0", ".h5").values():
        world = results.load(path)
        sites = world["site"].values
        assert sites[world["planted"] == 1].tolist() == ["attn 0"]
        assert int(world["decoy"].sum()) == 3
        assert not (world["planted"] * world["decoy"]).any()
        assert sites[abs(world["truth"]).argmax()] == "attn 0"  # the tag can act nowhere else
        known = world["score"].notnull().sum("site").values
        assert np.isin(known, [5, 10]).all()  # all sites, or those with an activation of their own
        assert float(world["score"].min()) > -1e-6  # sizes, and one less a cosine
    methods = [row[0] for row in rows_of(printed)[2:]]
    assert {"attribute_training, both tags", "patch_parameters, both tags", "chance"} < {*methods}
    assert len(methods) == len({*methods}) == world.sizes["by"] + 1
    assert "The plant has the largest true effect in 4 of 4 worlds, a decoy in 0." in printed
    assert "seeds 402, 403" in printed
    assert (tmp_path / "planted" / "planted.png").stat().st_size > 10_000


# --- arithmetic -------------------------------------------------------------------------------------------


def world(scores: list[float], planted: int = 0) -> xr.Dataset:
    """Four sites, the first or another planted, the first the largest truth or a decoy, and a method's scores."""
    return xr.Dataset(
        {
            "truth": ("site", [-4.0, 1.0, 2.0, 3.0]),
            "planted": ("site", [int(i == planted) for i in range(4)]),
            "decoy": ("site", [int(i == 0 != planted) for i in range(4)]),
            "score": (("by", "site"), [scores]),
        },
        {"site": list("abcd"), "by": ["a method"]},
    )


@pytest.mark.parametrize(
    ("scores", "planted", "precision"),
    [
        ([9, 1, 2, 3], 0, 1.0),
        ([2.5, 1, 2, 3], 0, 1 / 2),
        ([0, 1, 2, 3], 0, 1 / 4),
        ([5, 5, 5, 5], 0, 1 / 4),  # nothing is told: no better than the worst
        ([9, 1, 2, 3], 3, 1 / 2),
        ([np.nan, 1, 2, 3], 3, 1.0),
    ],
)
def test_average_precision_is_one_over_the_rank_of_the_plant(scores, planted, precision):
    graded = planted_truth.graded(world(scores, planted), "a method")
    assert graded["precision"] == pytest.approx(precision)
    assert graded["n"] == np.isfinite(scores).sum()
    assert graded["largest"] == (planted == 0)


def test_the_largest_truth_is_graded_where_a_method_says_something_of_it():
    assert planted_truth.graded(world([2.5, 1, 2, 3], 3), "a method")["of the largest"] == pytest.approx(
        1 / 2
    )
    assert np.isnan(planted_truth.graded(world([np.nan, 1, 2, 3], 3), "a method")["of the largest"])


def test_ranks_are_correlated_with_the_size_of_the_truth():
    assert planted_truth.graded(world([4, 1, 2, 3]), "a method")["rank"] == pytest.approx(1.0)
    assert planted_truth.graded(world([1, 4, 3, 2]), "a method")["rank"] == pytest.approx(-1.0)
    assert planted_truth.graded(world([2, 2, 2, 2]), "a method")["rank"] == 0.0
    assert planted_truth.graded(world([np.nan, 1, 2, 3]), "a method") == {}


def test_worlds_where_the_plant_is_not_the_largest_effect_stand_apart():
    """Of each seed two forks: the method finds the plant where it is the truth, and not where it is not."""
    found = planted_truth.grades(
        {"a": {seed: [world([9, 1, 2, 3]), world([9, 1, 2, 3], 1)] for seed in (1, 2)}}
    )
    row, chance = rows_of("\n".join(planted_truth.table(found)))[2:]
    assert row[:4] == ["a method", "1.00 [1.00, 1.00]", "0.25 [0.25, 0.25]", "1.00 [1.00, 1.00]"]
    assert chance[1] == f"{(1 + 1 / 2 + 1 / 3 + 1 / 4) / 4:.2f}"
    said = "The plant has the largest true effect in 2 of 4 worlds, a decoy in 2."
    assert planted_truth.worlds_said(found) == said


def test_the_axes_of_the_figure_end_at_one_and_hold_every_mean():
    rows = [
        {"plant": "a", "seed": seed, "method": "m", "precision": p, "rank": 1.0, "largest": True, "n": 4}
        for seed, p in enumerate((1.0, 1.0, 0.5))
    ]
    left, right = planted_truth.draw(pd.DataFrame(rows)).axes
    assert left.get_xlim() == (0, 1)
    assert right.get_xlim() == (-1, 1)
    assert any(np.allclose(line.get_xdata(), [5 / 6]) for line in left.get_lines())


def test_covered_elements_stand_in_one_vector_in_the_sites_order():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7.0, 8.0])}
    site = Site("some", {"b": ..., "a": (slice(None), 1)})
    assert planted_truth.covered(tensors, site).tolist() == [7.0, 8.0, 1.0, 4.0]
