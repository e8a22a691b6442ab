"""Two X2s from one X1."""

from dataclasses import replace

import pytest
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory, TrajectoryWriter
from dynamics.config import PhaseConfig
from scripts.shared.forks import (
    CONFIRMED,
    EXPLORED,
    asked,
    command_line,
    forked,
    seeds_said,
    sparse,
    trained,
)
from tests.scripts.calling import forks_of


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
def test_seeds_that_confirm_are_opened_only_when_told_and_all_together(alias_runs, tmp_path, capsys):
    runs = tmp_path / "runs"
    forks_of(runs, alias_runs[0], *EXPLORED)
    forks_of(runs, alias_runs[1], *CONFIRMED[:-1])
    words = [str(runs), "--out", str(tmp_path / "out")]
    explored, others = asked(_seed_of, command_line("", "x", words))
    assert {seed: [int(f["seed"]) for f in forks] for seed, forks in explored.items()} == {
        seed: [0, 0] for seed in EXPLORED
    }
    assert others == {}
    few, _ = asked(_seed_of, command_line("", "x", [*words, "--explore", "2"]))
    assert list(few) == [400, 401]
    drawn, _ = asked(_seed_of, command_line("", "x", [*words, "--roles", "drawn"]))
    assert {len(forks) for forks in drawn.values()} == {1}
    with pytest.raises(SystemExit):
        command_line("", "x", [*words, "--confirm"])
    assert "seeds 423 are not trained to their end" in capsys.readouterr().err
    forks_of(runs, alias_runs[1], CONFIRMED[-1])
    _, others = asked(_seed_of, command_line("", "x", [*words, "--confirm"]))
    assert {seed: [int(f["seed"]) for f in forks] for seed, forks in others.items()} == {
        seed: [1, 1] for seed in CONFIRMED
    }


@pytest.mark.slow
def test_a_seed_that_is_still_being_trained_is_left_out(alias_runs, tmp_path, capsys):
    forks_of(tmp_path, alias_runs[0], 400)
    whole = Trajectory.open(alias_runs[0])
    with TrajectoryWriter(tmp_path / "cut", whole.config) as writer:
        writer.append(whole.at(0))
    forks_of(tmp_path, tmp_path / "cut", 401)
    assert trained(tmp_path, EXPLORED) == [400]
    with pytest.raises(SystemExit):
        command_line("", "x", [str(tmp_path / "nowhere")])
    assert "none of seeds 400, 401" in capsys.readouterr().err


def test_a_table_says_which_seeds_it_lacks_and_how_many_forks_were_asked():
    explored, others = (dict.fromkeys(seeds, (None, None)) for seeds in (EXPLORED, CONFIRMED))
    few, most = dict(list(explored.items())[:-2]), dict(list(others.items())[1:])
    assert seeds_said(explored, {}).startswith("12 seeds explored, none yet that confirm")
    assert "without" not in seeds_said(explored, others)
    assert seeds_said(few, {}).endswith("each the mean of both forks; without seeds 410, 411")
    assert seeds_said(explored, most).endswith("; without seeds 412")
    assert seeds_said(dict.fromkeys(EXPLORED, (None,)), {}).endswith("each one fork")
