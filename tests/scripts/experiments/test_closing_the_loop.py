"""Closing the loop, in miniature: the ways of choosing explored, the best one confirmed, and what is gone."""

import re

import numpy as np
import pytest
import torch
import xarray as xr

from dynamics import results
from dynamics.sites import Site
from scripts.experiments import closing_the_loop
from scripts.experiments.closing_the_loop import Way
from scripts.shared.forks import CONFIRMED, EXPLORED
from tests.scripts.calling import call, forks_of, in_small, rows_of


@pytest.mark.slow
def test_every_way_is_explored_and_the_best_alone_is_run_on_the_seeds_that_confirm(alias_runs, tmp_path):
    forks_of(tmp_path / "forks", alias_runs[0], *EXPLORED)
    forks_of(tmp_path / "forks", alias_runs[1], *CONFIRMED)
    ways = (Way("alone", 2), Way("together", 2))
    with in_small(closing_the_loop, WAYS=ways, LATER=Way("alone", 3), STEPS=4):
        printed = call(closing_the_loop, tmp_path / "forks", "--out", tmp_path / "loop", "--confirm")
    (best,) = [way for way in ways if f"Of these ways the best: {way}." in printed]
    for way in ways:
        opened = sorted(
            path.name.split("-")[1] for path in (tmp_path / "loop" / f"{way.choose}-{way.look}").iterdir()
        )
        assert opened == (
            ["0", "1"] if way == best else ["0"]
        )  # the runs of explored seeds, of those that confirm
        for path in (tmp_path / "loop" / f"{way.choose}-{way.look}").iterdir():
            worlds = results.load(path)
            sets = [{*str(names).split(", ")} for names in worlds["matrices"].values]
            assert worlds["erased"].values.tolist() == ["chosen", "random 0", "random 1"]
            assert len(sets[0]) == 3  # a tenth of 30
            assert not any(sets[0] & other for other in sets[1:])
            matched = worlds[["parameters", "difference"]].isel(erased=slice(1, None)).to_array()
            assert bool(((matched > 0.5) & (matched < 2)).all())
    assert printed.count(f"(together, {ways[1].look} steps)") + printed.count("(alone, 2 steps)") == 3
    assert printed.count("(alone, 3 steps)") == 1
    assert [path.name.split("-")[1] for path in (tmp_path / "loop" / "alone-3").iterdir()] == ["0"]
    assert printed.count("The goals") == printed.count("Logits gone where W_E") == 2


# --- arithmetic -------------------------------------------------------------------------------------------


def _found(**gaps):
    """Both forks of three seeds alike, with the logits' difference of each world; accuracies a tenth of it."""
    return {
        seed: [
            xr.Dataset(
                {
                    "correct_logit": ("erased", [float(values[seed]) for values in gaps.values()]),
                    "accuracy": ("erased", [values[seed] / 10 for values in gaps.values()]),
                },
                {"erased": [name.replace("_", " ") for name in gaps]},
            )
        ]
        * 2
        for seed in range(3)
    }


PLAIN = _found(nowhere=[4.0, 6.0, 5.0], everywhere=[1.0, 1.0, 1.5])
GOOD = _found(chosen=[2.0, 2.5, 2.0], random_0=[4.0, 5.0, 5.0], random_1=[3.0, 5.5, 4.0])
POOR = _found(chosen=[1.5, 2.0, 2.0], random_0=[2.0, 2.5, 2.0], random_1=[2.0, 2.0, 2.5])


def test_what_is_gone_is_the_ratio_of_means_over_seeds():
    way = Way("together", 10)
    rows = {row[0]: row for row in rows_of("\n".join(closing_the_loop.table(PLAIN, {way: GOOD})))[2:]}
    full, whole = 5.0, 5.0 - 3.5 / 3
    for words, mean in (
        ("the chosen 10% of matrices (together, 10 steps)", 6.5 / 3),
        ("random matrices, matched", (14 / 3 + 12.5 / 3) / 2),
    ):
        assert rows[words][4].startswith(f"{(full - mean) / whole:.0%} [")
        assert rows[words][3].startswith(f"{mean:+.2f} [")
        assert rows[words][1].startswith(f"{mean / 10:+.2f} [")
    assert rows["everywhere"][4] == "100% [100%, 100%]"
    assert rows["nowhere"][4].startswith("0% [")


def test_the_best_way_takes_most_beyond_what_random_matrices_take():
    """The other way's matrices take more, but so do random ones."""
    assert closing_the_loop.best({Way("alone", 10): POOR, Way("together", 10): GOOD}) == Way("together", 10)


@pytest.mark.parametrize(
    ("chosen", "random", "said"),
    [(1.0, 4.9, "are reached"), (3.0, 4.9, "are not reached"), (1.0, 2.0, "are not reached")],
)
def test_both_goals_must_be_reached(chosen, random, said):
    jitter = np.array([0.0, 0.1, -0.1])
    found = _found(chosen=chosen + jitter, random_0=random + jitter)
    plain = _found(nowhere=5 + jitter, everywhere=1 + jitter / 2)
    assert said in closing_the_loop.verdict(plain, found)


def test_forks_that_chose_the_embedding_stand_apart():
    plain, found = _found(nowhere=[4, 6, 5]), _found(chosen=[1, 2, 0])
    for seed, forks in found.items():
        found[seed] = [
            fork.assign(matrices=("erased", [name]))
            for fork, name in zip(forks, ("W_E, W_K", "W_V"), strict=True)
        ]
    found[2][1] = found[2][0]
    said = closing_the_loop.by_embedding(plain, found)
    assert re.search(r"among the chosen: \+4.25 \[.*\] \(4 forks\); where", said)  # 3, 4, 5 and 5
    assert re.search(r"where it is not: \+3.50 \[.*\] \(2 forks\)\.", said)


def test_what_a_site_covers_is_squared_and_summed():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7.0, 8.0])}
    site = Site("some", {"b": ..., "a": (slice(None), 1)})
    assert closing_the_loop.squared(tensors, site) == 49 + 64 + 1 + 16
