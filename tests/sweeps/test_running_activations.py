"""Verbs of activations, swept over training."""

import warnings

import numpy as np
import pytest

import dynamics as dy
from dynamics.config import FactsRun, LatePhasesConfig, PhaseConfig, ScheduleConfig, ToyConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Facts, hardly trained."""
    brief = PhaseConfig(steps=4, warmup=1)
    config = FactsRun(
        model=ToyConfig(n_layers=2, n_heads=2, d_model=16, d_head=8, d_mlp=16, n_ctx=5),
        phases=LatePhasesConfig(learn=brief, late=brief),
        schedule=ScheduleConfig(per_decade=1, dense=1),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's
        return dy.training.fit(config, tmp_path_factory.mktemp("facts") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("verb", [dy.patch_activations, dy.attribute_activations])
def test_a_sweep_of_activations_over_training_is_the_verb_at_every_checkpoint(run, verb):
    task = dy.tasks.load(run.config)
    contrasts = task.contrasts(facts=task.late[:2])
    model = task.model()
    chosen = dy.sites.activations(model, "blocks.*.attn.hook_z", ("layer", "head"), contrasts[0].base)
    steps = [0, run.steps[-1]]
    found = dy.sweep(verb, run, steps, contrasts, chosen, dy.measures.logit_difference)
    name = "effect" if "effect" in found else "attribution"
    for step in steps:
        alone = verb(dy.Recipe(model), run.at(step), contrasts, chosen, dy.measures.logit_difference)
        np.testing.assert_array_equal(found[name].sel(step=step), alone[name])
    assert not np.array_equal(*(found[name].sel(step=step) for step in steps))
