"""Circuits by threshold beside random ones: edges drawn, shares kept, and the table in miniature."""

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory
from dynamics import results
from dynamics.config import ToyConfig
from dynamics.models.toy import ToyTransformer
from scripts.experiments import circuits
from tests.scripts.calling import call, in_small, rows_of


@pytest.fixture(scope="module")
def edges():
    return dy.sites.paths(ToyTransformer(ToyConfig(n_layers=2, n_heads=2, d_model=8, d_head=4, d_mlp=8), 5))


def test_random_edges_are_as_many_and_differ(edges):
    draw = np.random.default_rng(0)
    drawn = circuits.at_random(edges, 20, draw)
    assert len(set(drawn)) == len(drawn) == 20
    assert set(drawn) < {site.label for site in edges}
    assert drawn != circuits.at_random(edges, 20, draw)


def test_random_ways_lead_through_but_for_the_last(edges):
    from dynamics.attribution.circuits import leading_through

    for seed in range(5):
        drawn = circuits.by_ways(edges, 15, np.random.default_rng(seed))
        assert len(set(drawn)) == len(drawn) == 15
        ways = leading_through(tuple(label.split(" -> ")) for label in drawn)
        assert len(ways) >= 15 - 4  # the longest way has five edges


def test_kept_is_one_for_the_clean_and_zero_for_the_corrupted_prompts():
    dims = ("example", "site")
    found = xr.Dataset(
        {
            "patched": (dims, [[5.0, 1.0, 2.0], [9.0, -1.0, 4.0]]),
            "base": ("example", [5.0, 9.0]),
            "source": ("example", [1.0, -1.0]),
        }
    )
    np.testing.assert_allclose(circuits.kept(found), [1, 0, 3 / 7])


@pytest.mark.slow
def test_circuits_writes_a_table_of_what_it_measured(facts_runs, tmp_path):
    out = tmp_path / "edges"
    with in_small(circuits, N_SETS=5, N_ALONG=1, THRESHOLDS=circuits.THRESHOLDS[::3]):
        (row,) = rows_of(call(circuits, *facts_runs, "--out", out))[2:]
    assert row[:2] == ["facts", "2"]
    assert row[2].endswith(
        f" of {len(dy.sites.paths(dy.tasks.load(Trajectory.open(facts_runs[0]).config).model()))}"
    )
    shares = []
    for folder in sorted(out.iterdir()):
        if folder.is_dir():
            scores, found, tested = (
                results.load(folder / f"{n}.h5") for n in ("scores", "found", "circuits")
            )
            enough = circuits.kept(found) >= circuits.WANTED
            chosen = int(np.argmax(enough)) if enough.any() else -1
            shares.append(circuits.kept(tested)[chosen])
            assert not set(scores["example"].values) & set(tested["example"].values)
    assert f"{np.mean(shares):+.2f}" in row[4]
    assert (out / "edges.png").exists()
