"""Exchange between the ends of phases, in miniature: shares that follow from states exchanged by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import dynamics as dy
from checkpoints import CheckpointPair, Trajectory
from dynamics import results
from scripts.experiments import transfer
from scripts.shared.runs import run_key
from tests.scripts.calling import call, in_small, named, rows_of

pytestmark = pytest.mark.slow


def _right(model, state, batch):
    logits = torch.func.functional_call(model, state, (batch.tokens,))[
        torch.arange(len(batch)), batch.target_pos
    ]
    return float(logits[torch.arange(len(batch)), batch.targets].mean())


def test_of_every_run_shares_are_kept_and_told(alias_runs, tmp_path):
    with in_small(transfer, LANGUAGES={}):
        printed = call(transfer, *alias_runs)
        assert call(transfer, *alias_runs) == printed  # from what is kept
    kept = named(tmp_path / "runs" / "transfer" / "aliases", ".h5")
    assert len(kept) == len(alias_runs)
    found = [results.load(path) for path in kept.values()]
    rows = {row[1]: row for row in rows_of(printed) if row[0] == "aliases"}
    share = [
        float(f["share"].sel(exchange="sufficient", site="embed", measure="correct_logit")) for f in found
    ]
    assert rows["embed"][2].startswith(f"{sum(share) / len(share):+.2f}")
    assert (tmp_path / "runs" / "transfer" / "transfer.png").stat().st_size > 10_000


def test_shares_are_those_of_states_put_together_by_hand(alias_runs, tmp_path):
    run = Trajectory.open(alias_runs[0])
    found = transfer.of_aliases(alias_runs[0], tmp_path)
    task = dy.tasks.load(run.config)
    early, late = (dict(run.at(task.config.phases.starts[name]).parameters) for name in ("x2", "end"))
    model, asked, own = task.model(), task.evaluation["Dt3"], [task.alias(i) for i in task.sets["Dt3"]]
    whole = _right(model, late, asked) - _right(model, early, asked)
    rows, rest = early["embed.W_E"].clone(), late["embed.W_E"].clone()
    rows[own], rest[own] = late["embed.W_E"][own], early["embed.W_E"][own]
    suffices = (_right(model, {**early, "embed.W_E": rows}, asked) - _right(model, early, asked)) / whole
    needed = (_right(model, late, asked) - _right(model, {**late, "embed.W_E": rest}, asked)) / whole
    of_rows = found["share"].sel(site="own rows", measure="correct_logit")
    assert float(of_rows.sel(exchange="sufficient")) == pytest.approx(suffices, abs=1e-4)
    assert float(of_rows.sel(exchange="necessary")) == pytest.approx(needed, abs=1e-4)


def test_a_shuffled_change_is_as_large_in_every_tensor_and_another(alias_runs):
    run = Trajectory.open(alias_runs[0])
    pair = CheckpointPair(run.at(run.steps[0]), run.at(run.steps[-1]))
    shuffled = transfer._shuffled(pair, 3)
    for name, before in pair.base.parameters.items():
        change, moved = pair.source.parameters[name] - before, shuffled.parameters[name] - before
        assert float(moved.norm()) == pytest.approx(float(change.norm()), rel=1e-4)
    name = "embed.W_E"
    assert not torch.equal(shuffled.parameters[name], pair.source.parameters[name])


def test_the_pair_of_a_language_lies_around_what_is_learnt(facts_runs):
    run = Trajectory.open(facts_runs[0])
    task = dy.tasks.load(run.config)
    asked, model = task.evaluation["heldout"], task.model()
    with in_small(transfer, BEFORE=1.1, AFTER=-1.0):
        pair = transfer._learning(model, run, asked, run.steps[3])
    assert (pair.base.step, pair.source.step) == tuple(run.steps[3:5])
    with in_small(transfer, BEFORE=-1.0), pytest.raises(SystemExit, match="never goes"):
        transfer._learning(model, run, asked, 0)


def test_accounts_that_are_not_there_are_left_out(alias_runs, tmp_path):
    assert transfer.account_of(alias_runs[0], tmp_path) is None


def test_the_account_of_a_run_is_told_as_shares_of_the_rise(alias_runs, tmp_path):
    run = Trajectory.open(alias_runs[0])
    task = dy.tasks.load(run.config)
    own, other = (task.alias(task.sets[name][0]) for name in ("Dt3", "Df4"))
    account = xr.Dataset(
        {
            "attribution": (
                ("step", "source", "site", "example"),
                np.tile(np.reshape([3.0, 1.0, 2.0, 0.5], (1, 1, 4, 1)), (2, 1, 1, 1)),
            ),
            "value": (("step", "example"), [[1.0], [9.0]]),
        },
        {
            "site": ["embed", "attn 0", f"embed.W_E {own}", f"embed.W_E {other}"],
            "level": ("site", ["components", "components", "rows", "rows"]),
            "index": ("site", [-1, -1, own, other]),
            "example": ["Dt3"],
        },
    )
    results.save(account, tmp_path / run_key(run) / "whole.h5")
    assert transfer.account_of(alias_runs[0], tmp_path) == {
        "embed": 6 / 8,
        "attn 0": 2 / 8,
        "own rows": 4 / 8,
        "other rows": 2 / 8,
    }


def test_metrics_and_exchange_read_the_same_questions(alias_runs, tmp_path):
    """The accuracy after the exchange of everything is that which training logged at its end."""
    found = transfer.of_aliases(alias_runs[0], tmp_path)
    logged = pd.read_csv(alias_runs[0] / "metrics.csv").set_index("step")
    column = next(c for c in logged.columns if "Dt3" in c and "acc" in c)
    last = logged[column].dropna().iloc[-1]
    assert float(found["after"].sel(measure="accuracy")) == pytest.approx(last, abs=1e-6)
