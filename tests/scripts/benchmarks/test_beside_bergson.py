"""MAGIC on a run of the aliases in miniature, where Bergson is installed."""

from functools import partial

import numpy as np
import pytest
import torch

import dynamics as dy
from checkpoints import Trajectory
from scripts.benchmarks import beside_bergson as beside
from scripts.experiments import account
from scripts.shared.difference import difference
from tests.scripts.calling import call, in_small, rows_of

STEPS = 4

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
"""Its libraries warn of what they do."""


@pytest.fixture(autouse=True)
def _with_bergson():
    pytest.importorskip("bergson", reason="Bergson is not installed beside this package")


def derivatives(task, start, defined, eps=1e-3):
    """Of D at the end by each definition's weight: trained again with a little more and a little less."""
    recipe, (measure, probe) = task.recipe(), difference(task)
    batches = [task.batch(start.step + i) for i in range(STEPS)]

    def end(of, by):
        def loss(model, batch):
            weight = torch.tensor([1 + by * (s == of) for s in task.sources(batch, by="integer")])
            losses = torch.nn.functional.cross_entropy(
                dy.measures.target_logits(model, batch), batch.targets, reduction="none"
            )
            return (losses * weight).sum() / weight.sum()

        weighted = dy.Recipe(recipe.model, loss, recipe.optimizer, recipe.scheduler, recipe.clip)
        return account._end(weighted, start, batches, measure, probe)

    return np.array([(end(d, eps) - end(d, -eps)) / (2 * eps) for d in defined])


def test_magic_is_the_derivative_of_the_very_training_by_the_weight_of_a_definition(alias_runs):
    run = Trajectory.open(alias_runs[0])
    task = dy.tasks.aliases.load(run.config)
    start = run.at(task.config.phases.starts["x2"])
    with in_small(account, RETRAINED=STEPS):
        batches = [task.batch(start.step + i) for i in range(STEPS)]
        label = partial(task.sources, by="integer")
        defined = sorted({s for b in batches for s in label(b) if s.startswith("definition of")})[:6]
        found = beside.magic(task, start, defined, 1e-17)
        by_hand = derivatives(task, start, defined)
    assert float(found["apart"]) < 1e-4
    assert np.corrcoef(found["MAGIC"].values, by_hand)[0, 1] > 0.99
    assert found["MAGIC"].values == pytest.approx(by_hand, rel=0.05, abs=0.02 * np.abs(by_hand).max())


def test_scores_are_told_beside_those_of_the_account(alias_runs, tmp_path):
    with in_small(account, RETRAINED=STEPS, HALVES=6), in_small(beside, EPS_ROOT=(1e-17,)):
        said = call(beside, alias_runs[0], "--out", tmp_path)
    names = [row[0] for row in rows_of(said)[2:]]
    assert names == [
        "account",
        "attribute_examples",
        "TracIn",
        "random",
        "MAGIC, eps_root 1e-17",
        "the same under noise",
    ]
