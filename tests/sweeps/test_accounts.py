"""The account of a recorded run: replayed, in stretches, by any number of workers, always the same."""

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics import measures, sites, sweeps
from dynamics.tasks import AliasTask
from tests.zoo.cases import first_quick

FIRST, LAST = 6, 12


def accounted(run, **changes):
    given = {"sites": sites.components, "measure": measures.correct_logit, **changes}
    return dy.account(run, FIRST, LAST, given.pop("sites"), given.pop("measure"), **given)


@pytest.mark.slow
def test_it_is_the_account_of_the_same_steps_taken_by_hand(run):
    task = dy.tasks.load(run.config)
    recipe = task.recipe()
    by_hand = dy.attribute_training(
        recipe,
        run.at(FIRST),
        task.batches(FIRST, LAST),
        sites.components(recipe.model),
        sweeps.of_evaluation(task),
        measures.correct_logit,
        sources=task.sources,
    )
    found = accounted(run, sources=AliasTask.sources)
    xr.testing.assert_equal(found, by_hand)
    assert found.attrs["partition"] == 1
    assert set(found["example"].values) == {"Dt3", "Df4"}


@pytest.mark.slow
@pytest.mark.parametrize("stretch", first_quick([2, 4]), ids=["that divide it", "the last of them shorter"])
def test_in_stretches_it_says_the_same_but_for_momentum_from_before_each(run, stretch):
    whole, parts = (
        accounted(run, sources=AliasTask.sources),
        accounted(run, sources=AliasTask.sources, stretch=stretch),
    )
    assert list(parts["step"].values) == list(whole["step"].values)
    for name in ("value", "residual", "nodes"):
        xr.testing.assert_equal(parts[name], whole[name])
    np.testing.assert_allclose(
        parts["attribution"].sum("source"), whole["attribution"].sum("source"), rtol=0, atol=1e-6
    )
    assert (
        abs(parts["attribution"].sel(source="before")).sum()
        > abs(whole["attribution"].sel(source="before")).sum()
    )


@pytest.mark.slow
@pytest.mark.usefixtures("workers_at_hand")
def test_serial_and_two_workers_give_the_same_to_the_bit_and_what_is_kept_is_not_computed_again(
    run, tmp_path
):
    by_integer = {"sources": AliasTask.sources, "stretch": 2}
    serial = accounted(run, **by_integer)
    shared = accounted(run, **by_integer, workers=2, out=tmp_path)
    xr.testing.assert_identical(shared, serial)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert len(kept) >= 3
    xr.testing.assert_identical(accounted(run, **by_integer, out=tmp_path), serial)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == kept


def test_a_dry_run_foretells_steps_and_memory_and_keeps_nothing(run):
    found = sweeps.estimate_account(run, FIRST, LAST, sites.components, measures.correct_logit)
    assert found.seconds > 0
    assert found.megabytes > 0
    assert found.kept == 0


@pytest.mark.parametrize("stretch", [0, 7])
def test_stretches_that_do_not_fit_are_refused(run, stretch):
    with pytest.raises(ValueError, match="stretches of"):
        accounted(run, stretch=stretch or -1)
