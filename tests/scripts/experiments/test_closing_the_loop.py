"""Closing the loop, in miniature: every world of every run, and what its table says is gone."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from dynamics.sites import Site
from scripts.experiments import closing_the_loop
from tests.scripts.calling import call, named, rows_of


@pytest.mark.slow
def test_the_loop_is_closed_in_every_world_of_every_run(alias_runs, tmp_path):
    arguments = [*alias_runs, "--steps", "4", "--look", "2", "--workers", "1", "--out", tmp_path / "loop"]
    printed = call(closing_the_loop, *arguments)
    tables = named(tmp_path / "loop", "-4-2-together.csv")
    assert {*(tmp_path / "loop").iterdir()} == {*tables.values()}
    for table in tables.values():
        worlds = pd.read_csv(table).set_index("erased")
        n_random = closing_the_loop.N_RANDOM
        assert worlds.index.tolist() == [
            "nowhere", "everywhere", "chosen", *(f"random {i}" for i in range(n_random)),
        ]  # fmt: skip
        chosen = worlds.loc["chosen", "matrices"].split(", ")
        assert len(chosen) == 3  # a tenth of 30
        for name in worlds.index[3:]:
            assert not {*chosen} & {*worlds.loc[name, "matrices"].split(", ")}
            assert 0.5 < worlds.loc[name, "parameters of the chosen"] < 2
            assert 0.5 < worlds.loc[name, "difference of the chosen"] < 2
        logits = worlds["correct_logit"]
        assert logits.notna().all()
        assert logits["nowhere"] != logits["everywhere"]
    head, _, *rows = rows_of(printed)
    assert len(head) == 5
    assert [row[0] for row in rows] == [
        "nowhere", "everywhere", "the chosen 10% of matrices", "random matrices, matched",
    ]  # fmt: skip
    assert {len(row) for row in rows} == {5}
    assert "Seeds 0, 1; chosen together by the first 2 of 4 steps of X2" in printed
    assert call(closing_the_loop, *arguments) == printed


@pytest.mark.slow
def test_another_run_of_the_same_seed_is_not_given_the_first_runs_results(
    alias_runs, alias_config, fitted, tmp_path
):
    x1 = replace(alias_config.phases.x1, learning_rate=0.01)
    config = replace(alias_config, phases=replace(alias_config.phases, x1=x1))
    first, other = (
        closing_the_loop.one_run(folder, 2, 2, "alone", tmp_path / "loop")
        for folder in (alias_runs[0], fitted(config, tmp_path / "other"))
    )
    assert first["correct_logit"].tolist() != other["correct_logit"].tolist()


def test_what_is_gone_is_the_ratio_of_means_over_seeds():
    gaps = {"nowhere": [4.0, 6.0, 5.0], "everywhere": [1.0, 1.0, 1.5], "chosen": [2.0, 2.5, 2.0]}
    gaps |= {"random 0": [4.0, 5.0, 5.0], "random 1": [3.0, 5.5, 4.0]}
    rows = [
        {"seed": i, "erased": name, "matrices": "W_E, W_U", "parameters of the chosen": 1.0,
         "difference of the chosen": 1.0, "accuracy": value[i] / 10, "correct_logit": value[i]}
        for name, value in gaps.items() for i in range(3)
    ]  # fmt: skip
    by_name = {
        row[0]: row for row in rows_of(closing_the_loop.table(pd.DataFrame(rows), 4, 10, "together"))[2:]
    }
    mean = {name: np.mean(value) for name, value in gaps.items()}
    mean["random"] = (mean.pop("random 0") + mean.pop("random 1")) / 2
    for name, row in {"chosen": "the chosen 10% of matrices", "random": "random matrices, matched"}.items():
        gone = (mean["nowhere"] - mean[name]) / (mean["nowhere"] - mean["everywhere"])
        assert by_name[row][4].startswith(f"{gone:.0%} [")
        assert by_name[row][3].startswith(f"{mean[name]:+.2f} [")
    assert by_name["everywhere"][4] == "100% [100%, 100%]"
    assert by_name["nowhere"][4].startswith("0% [")


def test_what_a_site_covers_is_squared_and_summed():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7.0, 8.0])}
    site = Site("some", {"b": ..., "a": (slice(None), 1)})
    assert closing_the_loop.squared(tensors, site) == 49 + 64 + 1 + 16
