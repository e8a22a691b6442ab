"""The forecast: what is known of an alias, and how well it foretells what becomes of it."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import dynamics as dy
from checkpoints import Trajectory
from scripts.experiments import forecast
from tests.scripts.calling import in_small, rows_of

DRAWS = np.random.default_rng(0)


def _rows(told, n=30, seeds=6):
    """Aliases of several seeds whose fate is told by one quantity, or by none; all else is noise."""
    names = forecast.columns(forecast.KINDS)
    rows = pd.DataFrame(DRAWS.standard_normal((n * seeds, len(names))), columns=names)
    rows["seed"] = np.repeat(np.arange(seeds), n)
    rows["internalised"] = DRAWS.random(n * seeds) if told is None else (rows[told] > 0).astype(float)
    return rows


def test_a_quantity_that_tells_is_found_and_a_kind_without_it_tells_nothing():
    rows, fresh = _rows("account in embed"), _rows("account in embed")
    assert min(forecast.explored(rows, forecast.KINDS)) > 0.95
    assert min(forecast.confirmed(rows, fresh, ["account"])) > 0.95
    assert abs(np.mean(forecast.confirmed(rows, fresh, ["tag", "definition"])) - 0.5) < 0.15


def test_of_noise_nothing_is_foretold_in_seeds_left_out():
    found = forecast.explored(_rows(None, seeds=20), forecast.KINDS)
    assert len(found) == 20
    assert abs(np.mean(found) - 0.5) < 0.1


def test_every_seed_is_scored_by_its_own_aliases():
    rows = _rows(None)
    scores = rows["account"].to_numpy()
    expected = [
        roc_auc_score(part["internalised"] >= 0.5, part["account"]) for _, part in rows.groupby("seed")
    ]
    assert forecast._by_seed(rows, scores) == pytest.approx(expected)
    rows.loc[rows["seed"] == 2, "internalised"] = 1.0
    assert np.isnan(forecast._by_seed(rows, scores)[2])


@pytest.mark.slow
def test_ablations_leave_out_one_kind_and_use_every_other():
    text = "\n".join(forecast.table(_rows("account"), None))
    assert all(f"| without {kind} |" in text and f"| {kind} alone |" in text for kind in forecast.KINDS)
    assert text.count("| – |") == 3 + 2 * len(forecast.KINDS)


def test_what_is_known_is_set_against_the_accuracy_seed_by_seed():
    rows = _rows("account", seeds=3).assign(**{"accuracy now": 0.0})
    fresh = _rows("account", seeds=3).assign(**{"accuracy now": 0.0})
    with in_small(forecast, KINDS={"answers": ("accuracy now",), "account": ("account",)}):
        (row,) = [r for r in rows_of("\n".join(forecast.table(rows, fresh))) if r[0].startswith("the first")]
    assert row[1:] == ["+0.50 [+0.50, +0.50], n = 3"] * 2  # 1 less .5, which a constant scores


@pytest.mark.slow
def test_what_is_known_of_an_alias_is_read_from_its_run(alias_runs):
    with in_small(forecast, KNOWN_AFTER=3):
        run = Trajectory.open(alias_runs[0])
        task = dy.tasks.load(run.config)
        found = forecast.known(task, run)
    starts = task.config.phases.starts
    recipe = task.recipe()
    start, end = run.at(starts["x2"]), run.at(starts["end"])
    state = dy.steps.reach(recipe, run, starts["x2"] + 3, task.batch)
    for place, contrast in enumerate(task.contrasts()):
        row, token = found.isel(example=place), task.alias(contrast.coords["integer"])
        assert row["set"] == contrast.coords["set"]
        assert float(row["reliable"]) == (contrast.coords["set"] == "Dt3")
        end.restore(recipe.model)
        right = float(dy.measures.accuracy(recipe.model, contrast.probe).detach().mean())
        assert float(row["internalised"]) == pytest.approx(right)
        way = state.parameters["embed.W_E"][token] - start.parameters["embed.W_E"][token]
        assert float(row["row's way so far"]) == pytest.approx(float(way.norm()), rel=1e-5)
        values = []
        for at in (start, state):
            at.restore(recipe.model)
            values.append(float(dy.measures.centred_logit(recipe.model, contrast.probe).detach().mean()))
        assert float(row["account"]) == pytest.approx(values[1] - values[0], abs=0.02)
