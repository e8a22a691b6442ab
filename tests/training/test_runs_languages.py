"""Runs of the languages: trained, recorded, resumed and replayed as any run is; and what they learn."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

import dynamics as dy
from checkpoints import Trajectory
from dynamics import studies, tasks
from dynamics.config import (
    AcronymsConfig,
    AcronymsRun,
    ConfigError,
    FactsConfig,
    FactsRun,
    IoiConfig,
    IoiRun,
    LatePhasesConfig,
    OnePhaseConfig,
    PhaseConfig,
    RunConfig,
    ScheduleConfig,
    ToyConfig,
    read,
)
from dynamics.tasks import FactsTask
from dynamics.training import fit
from dynamics.training.runs import kept_steps

SMALL = ToyConfig(n_layers=1, n_heads=2, d_model=16, d_head=8, d_mlp=16, n_ctx=14)
SHARED = {"model": SMALL, "schedule": ScheduleConfig(per_decade=3, dense=3, evaluate_every=4), "seed": 3}
ONE = OnePhaseConfig(learn=PhaseConfig(8, warmup=2), batch_size=16)
TWO = LatePhasesConfig(learn=PhaseConfig(8, warmup=2), late=PhaseConfig(6), batch_size=16)
TINY = {
    "ioi": IoiRun(task=IoiConfig(n_names=8, n_prompts=100), phases=ONE, **SHARED),
    "acronyms": AcronymsRun(task=AcronymsConfig(n_words=1, n_prompts=50), phases=ONE, **SHARED),
    "facts": FactsRun(task=FactsConfig(n_subjects=8, n_late=2), phases=TWO, **SHARED),
}


@pytest.fixture
def tiny(made_once):
    """Name -> the run of a tiny config, not to be written into."""
    return lambda name: Trajectory.open(made_once(f"tiny-{name}", partial(fit, TINY[name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_run_is_recorded_and_its_task_rebuilt_from_its_own_config(name, tiny):
    config = TINY[name]
    run = tiny(name)
    assert run.steps == kept_steps(config)
    assert run.last.step == config.phases.starts["end"]
    assert read(run.config) == config
    task = tasks.load(run.config)
    assert type(task).__name__ == f"{name.capitalize()}Task"
    metrics = pd.read_csv(run.path / "metrics.csv")
    assert {f"{batch}_accuracy" for batch in task.evaluation} < set(metrics.columns)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_stored_neighbour_replays_bit_for_bit(name, tiny):
    verdicts = list(studies.verify(tiny(name)))
    assert len(verdicts) >= 5
    assert [v for v in verdicts if v.differences] == []


@pytest.mark.slow
def test_one_optimizer_goes_through_both_phases_of_facts(tiny):
    run = tiny("facts")
    assert TINY["facts"].phases.optimizer_starts == (0,)
    assert {run.at(step).begins_optimizer for step in run.steps[1:]} == {False}
    (entering,) = {float(s["step"]) for s in run.at(8).optimizer.state.values()}
    assert entering == 8


@pytest.mark.slow
def test_a_run_interrupted_in_its_late_phase_resumes_to_the_same_bits(tiny, tmp_path, monkeypatch):
    whole = tiny("facts")
    honest = FactsTask.batch

    def interrupt(self, step):
        if step == 11:
            raise KeyboardInterrupt
        return honest(self, step)

    monkeypatch.setattr(FactsTask, "batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(TINY["facts"], tmp_path / "stopped")
    monkeypatch.setattr(FactsTask, "batch", honest)
    again = fit(TINY["facts"], tmp_path / "stopped")
    assert again.steps == whole.steps
    assert all(again.at(step).differences(whole.at(step)) == [] for step in whole.steps)


def test_what_needs_an_alias_run_says_so_of_another(tiny):
    with pytest.raises(ConfigError, match=r"the run is of the task 'ioi'; this needs one of aliases"):
        tasks.aliases.load(tiny("ioi").config)


# --- what is learnt ---------------------------------------------------------------------------------------


def shortened(config: RunConfig, **steps: int) -> RunConfig:
    """A preset whose phases end once it has learnt what it learns, which is early; few checkpoints are kept."""
    phases = {name: replace(getattr(config.phases, name), steps=n) for name, n in steps.items()}
    return replace(
        config,
        phases=replace(config.phases, **phases),
        schedule=ScheduleConfig(2, dense=0, evaluate_every=1000),
    )


LEARNT = {
    "ioi": shortened(IoiRun(), learn=270),
    "acronyms": shortened(AcronymsRun(), learn=160),
    "facts": shortened(FactsRun(), learn=140, late=60),
}
"""Held-out accuracy is above 0.99 from step 250, 150 and 120 on, with seeds 0, 1 and 2."""


@pytest.fixture
def learnt(made_once) -> Callable[[str], Trajectory]:
    """Name -> the run that has learnt that language."""
    return lambda name: Trajectory.open(made_once(f"learnt-{name}", partial(fit, LEARNT[name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNT)
def test_every_language_is_learnt_on_what_was_held_out(name, learnt):
    last = pd.read_csv(learnt(name).path / "metrics.csv").iloc[-1]
    assert last["heldout_accuracy"] > 0.95


@pytest.mark.slow
def test_late_facts_are_not_known_before_they_are_stated_and_are_afterwards(learnt):
    metrics = pd.read_csv(learnt("facts").path / "metrics.csv").set_index("step")
    starts = read(learnt("facts").config).phases.starts
    for question in ("late_accuracy", "late_stated_accuracy"):
        assert metrics.loc[starts["late"], question] < 0.2
        assert metrics.loc[starts["end"], question] > 0.95
    assert metrics.loc[starts["late"], "heldout_accuracy"] > 0.95


@pytest.mark.slow
def test_exchanging_the_whole_gradient_of_the_step_that_states_a_late_fact_writes_it(learnt):
    run = learnt("facts")
    task = tasks.load(run.config)
    recipe, step = task.recipe(), task.config.phases.starts["late"] + 1
    state = dy.steps.reach(recipe, run, step, task.batch)
    contrasts = [c for c in task.statements_at(step) if c.coords["in_batch"]]
    assert len(contrasts) >= 2
    everything = [dy.sites.everything(recipe.model)]
    found = dy.patch_gradients(recipe, state, contrasts, everything, dy.measures.correct_log_prob)
    gap = (found["source"] - found["base"]).values
    assert (gap > 0).all()
    np.testing.assert_allclose(found["effect"].isel(site=0).values, gap, rtol=1e-4, atol=1e-6)
    # the source step is the one training took: replayed, it measures the same
    after = dy.steps.replay(recipe, state, task.batch(step))
    stood = dy.patch_activations(
        recipe,
        after,
        [replace(c, base=c.probe, source=c.probe) for c in contrasts],
        dy.sites.activations(recipe.model, "hook_embed"),
        dy.measures.correct_log_prob,
    )
    np.testing.assert_allclose(stood["base"].values, found["source"].values, rtol=1e-4, atol=1e-5)
