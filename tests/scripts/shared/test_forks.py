"""Two X2s from one X1."""

from dataclasses import replace

import pytest
import xarray as xr

import dynamics as dy
from dynamics.config import PhaseConfig
from scripts.shared.forks import asked, forked, parser_of_forks, sparse


@pytest.mark.slow
def test_forks_begin_alike_and_exchange_the_roles_of_the_new_sets(alias_config, tmp_path):
    phases = replace(alias_config.phases, x1=PhaseConfig(4), pretrain=PhaseConfig(4), x2=PhaseConfig(3))
    config = replace(sparse(alias_config), phases=phases)
    runs = forked(config, tmp_path)
    x2 = config.phases.starts["x2"]
    drawn, exchanged = (dy.tasks.load(run.config) for run in runs.values())
    assert drawn.sets["Dt3"] == exchanged.sets["Df4"]
    assert drawn.sets["Df4"] == exchanged.sets["Dt3"]
    first, second = (run.at(x2) for run in runs.values())
    assert all((first.parameters[name] == p).all() for name, p in second.parameters.items())
    ends = [run.at(config.phases.starts["end"]).parameters for run in runs.values()]
    assert any((ends[0][name] != p).any() for name, p in ends[1].items())
    assert [run.steps for run in forked(config, tmp_path).values()] == [run.steps for run in runs.values()]


def _seed_of(task, run):
    return xr.Dataset({"seed": task.config.seed, "steps": len(run.steps)})


@pytest.mark.slow
def test_seeds_that_confirm_are_opened_only_when_told(alias_runs, tmp_path):
    for seed, folder in ((400, alias_runs[0]), (412, alias_runs[1])):
        for role in ("drawn", "exchanged"):
            (tmp_path / "runs" / f"seed-{seed}").mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / f"seed-{seed}" / role).symlink_to(folder)
    words = [str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    explored, others = asked(_seed_of, parser_of_forks("", "x").parse_args(words))
    assert [int(fork["seed"]) for fork in explored[400]] == [0, 0]
    assert others == {}
    _, others = asked(_seed_of, parser_of_forks("", "x").parse_args([*words, "--confirm"]))
    assert {seed: [int(fork["seed"]) for fork in forks] for seed, forks in others.items()} == {412: [1, 1]}
