"""Planted truth, in miniature: every method scores every site; grades and their table by hand."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from dynamics.sites import Site, SiteError
from scripts.experiments import planted_truth
from tests.scripts.calling import call, in_small, named, rows_of


@pytest.mark.slow
def test_a_planted_site_is_scored_by_every_method_in_every_run(alias_runs, tmp_path):
    arguments = (*alias_runs, "--plants", "attn 0", "--workers", "1")
    with in_small(planted_truth, WARM_UP=4, WINDOW=2, IMPULSE=1):
        printed = call(planted_truth, *arguments)
    kept = tmp_path / "runs" / "planted"
    tables = named(kept, "-attn-0.csv")
    pages = {kept / name for name in ("grades.csv", "planted.md", "planted.png")}
    assert {*kept.iterdir()} == {*tables.values()} | pages
    assert (kept / "planted.md").read_text() == printed
    for table in tables.values():
        world = pd.read_csv(table)
        assert world["site"].tolist() == [
            *("embed", "pos_embed"),
            *(f"{part} {layer}" for layer in (0, 1) for part in ("attn", "mlp", "ln")),
            *("ln_final", "unembed"),
        ]
        assert world.loc[world["planted"], "site"].tolist() == ["attn 0"]
        assert world["decoy"].sum() == 3
        assert not (world["planted"] & world["decoy"]).any()
        assert world["truth"].abs().idxmax() == world["planted"].idxmax()  # the tag can act nowhere else
        scored = world.drop(columns=["seed", "plant", "site", "planted", "decoy", "truth"])
        assert scored.notna().sum().isin([5, 10]).all()  # all sites, or those with an activation of their own
        assert (scored.fillna(0.0) > -1e-6).all().all()  # sizes, and one less a cosine
    grades = pd.read_csv(kept / "grades.csv")
    assert set(grades["seed"]) == {0, 1}
    assert grades["auc"].between(0, 1).all()
    assert len(grades) == 2 * grades["method"].nunique()
    rows = rows_of(printed)
    assert {len(row) for row in rows} == {5}  # no method's name has bars of its own
    assert [row[0] for row in rows[2:]].count("chance") == 1
    assert {row[0] for row in rows[2:]} == {*grades["method"], "chance"}
    assert "The plant has the largest true effect in 2 of 2 worlds." in printed
    assert call(planted_truth, *arguments) == printed


@pytest.mark.slow
def test_a_plant_that_the_model_does_not_have_is_named(alias_runs, tmp_path):
    with pytest.raises(SiteError, match="L0H2"):
        planted_truth.main([str(alias_runs[0]), "--plants", "L0H2", "--workers", "1", "--out", str(tmp_path)])


# --- arithmetic -------------------------------------------------------------------------------------------


def world(scores: list[float], planted: int = 0, seed: int = 0) -> pd.DataFrame:
    """Four sites, the first or another planted, and one method's scores."""
    return pd.DataFrame(
        {
            "seed": seed,
            "plant": "embed",
            "site": list("abcd"),
            "planted": [i == planted for i in range(4)],
            "decoy": False,
            "truth": [-4.0, 1.0, 2.0, 3.0],
            "a method": scores,
        }
    )


@pytest.mark.parametrize(
    ("scores", "planted", "auc", "top1"),
    [
        ([9, 1, 2, 3], 0, 1.0, 1.0),
        ([0, 1, 2, 3], 0, 0.0, 0.0),
        ([2, 1, 2, 3], 0, 0.5, 0.0),  # one below, one alike, one above
        ([5, 5, 5, 5], 0, 0.5, 0.0),
        ([9, 1, 2, 3], 3, 2 / 3, 0.0),
        ([np.nan, 1, 2, 3], 3, 1.0, 1.0),
    ],
)
def test_a_method_is_graded_by_how_many_sites_it_scores_below_the_plant(scores, planted, auc, top1):
    graded = planted_truth.graded(world(scores, planted), "a method")
    assert (graded["auc"], graded["top1"]) == (pytest.approx(auc), top1)
    assert graded["n"] == np.isfinite(scores).sum()


def test_ranks_are_correlated_with_the_size_of_the_truth():
    assert planted_truth.graded(world([4, 1, 2, 3]), "a method")["rank"] == pytest.approx(1.0)
    assert planted_truth.graded(world([1, 4, 3, 2]), "a method")["rank"] == pytest.approx(-1.0)
    assert planted_truth.graded(world([2, 2, 2, 2]), "a method")["rank"] == 0.0
    assert planted_truth.graded(world([np.nan, 1, 2, 3]), "a method") == {}


def test_the_table_of_methods_has_means_over_seeds_and_the_best_first():
    parts = [
        world([[9, 1, 2, 3], [0, 1, 2, 3]][i], seed=i).assign(**{"a better": [4, 1, 2, 3]}) for i in range(2)
    ]
    rows = rows_of(planted_truth.table(planted_truth.grades(parts)))
    assert [row[0] for row in rows[2:]] == ["a better", "a method", "chance"]
    assert rows[2][1] == "1.00 [1.00, 1.00]"
    bounds = scipy.stats.ttest_1samp([1, 0], 0).confidence_interval()
    assert rows[3][1] == f"0.50 [{bounds.low:.2f}, {bounds.high:.2f}]"
    assert rows[4][2] == "0.25"


def test_covered_elements_stand_in_one_vector_in_the_sites_order():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7.0, 8.0])}
    site = Site("some", {"b": ..., "a": (slice(None), 1)})
    assert planted_truth.covered(tensors, site).tolist() == [7.0, 8.0, 1.0, 4.0]
