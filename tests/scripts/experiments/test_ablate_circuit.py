"""The script that ablates a ranked circuit, on short runs: what it keeps, what it prints, what its numbers are."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

import dynamics as dy
from checkpoints import Trajectory
from dynamics.config import (
    AcronymsConfig,
    AcronymsRun,
    OnePhaseConfig,
    PhaseConfig,
    ScheduleConfig,
    ToyConfig,
)
from scripts.experiments import ablate_circuit
from tests.scripts.calling import call, in_small, rows_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ablated(fitted, tmp_path_factory):
    """Two runs that have learnt their words, where their Datasets are, and what was printed."""
    folder = tmp_path_factory.mktemp("circuits")
    config = AcronymsRun(
        task=AcronymsConfig(n_words=1, n_prompts=500),
        model=ToyConfig(n_layers=2, n_heads=2, d_model=32, d_head=16, d_mlp=32, n_ctx=7),
        phases=OnePhaseConfig(learn=PhaseConfig(steps=120, warmup=20, learning_rate=5e-3), batch_size=32),
        schedule=ScheduleConfig(per_decade=1, dense=0, evaluate_every=1000),
    )
    runs = [fitted(replace(config, seed=seed), folder / f"acronyms-{seed}") for seed in (1, 2)]
    with in_small(ablate_circuit, N_SETS=10, N_ALONG=2):
        printed = call(ablate_circuit, *runs, "--out", folder / "out")
    return runs, folder / "out", printed


def test_it_keeps_a_dataset_for_every_question_and_a_figure(ablated):
    _, out, printed = ablated
    names = {path.name for path in out.rglob("*.h5")}
    kinds = [f"{kind}-{values}.h5" for kind in ("first", "others", "all") for values in ("mean", "zero")]
    assert names == {"ranking.h5", "ranked-mean.h5", "along-mean.h5", *kinds}
    assert len(list(out.rglob("*.h5"))) == 2 * len(names)
    assert (out / "circuits.png").stat().st_size > 10_000
    head, _, *table = rows_of(printed)
    assert len(table) == 4
    assert all(len(row) == len(head) and all(row) for row in table)


def test_its_numbers_are_those_of_heads_set_to_zero_by_hand(ablated):
    runs, out, printed = ablated
    row = next(r for r in rows_of(printed) if r[:3] == ["acronyms", "zero", "accuracy"])
    shares = []
    for folder in runs:
        found = ablate_circuit.one_run(folder, out)
        run = Trajectory.open(folder)
        task = dy.tasks.load(run.config)
        model = task.model()
        model.load_state_dict({**run.last.parameters, **run.last.buffers})
        cut = [(int(h[1]), int(h[3])) for h in found.heads[: found.size]]

        def zero(z, hook, cut=cut):
            for layer, head in cut:
                if hook.name == f"blocks.{layer}.attn.hook_z":
                    z[:, :, head] = 0.0
            return z

        tested = dy.batch.concatenate([c.source for c in task.contrasts()[1::2]])
        with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_z"), zero)]), torch.no_grad():
            shares.append(dy.measures.accuracy(model, tested).double().mean().item())
    bounds = scipy.stats.t.interval(0.95, 1, np.mean(shares), scipy.stats.sem(shares))
    assert row[4] == f"{np.mean(shares):+.2f} [{bounds[0]:+.2f}, {bounds[1]:+.2f}]"


def test_heads_are_ranked_and_sized_on_prompts_that_are_not_tested(ablated):
    runs, out, _ = ablated
    found = ablate_circuit.one_run(runs[0], out)
    parts = found.parts
    assert not set(parts["ranking"]["example"].values) & set(parts["first-mean"]["example"].values)
    effect = parts["ranking"]["effect"].mean("example")
    order = [str(s).removeprefix("attn.z ") for s in effect["site"].values[np.argsort(-effect.values)]]
    assert found.heads == order
    right = parts["ranked-mean"]["patched"].sel(measure="accuracy").mean("example").values
    assert right[found.size - 1] < 0.5
    assert (right[: found.size - 1] >= 0.5).all()


def test_called_again_it_takes_what_is_there(ablated):
    runs, out, printed = ablated
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")}
    with in_small(ablate_circuit, N_SETS=10, N_ALONG=2):
        assert call(ablate_circuit, *runs, "--out", out) == printed
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")} == before
