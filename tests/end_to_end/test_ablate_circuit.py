"""The script that ablates a ranked circuit, on short runs: what it keeps, what it prints, what its numbers are."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import dynamics as dy
from checkpoints import Trajectory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = [
    "--model.n_layers=2", "--model.n_heads=2", "--model.d_model=32", "--model.d_head=16", "--model.d_mlp=32",
    "--task.n_words=1", "--task.n_prompts=500", "--phases.learn.steps=250", "--phases.batch_size=32",
]  # fmt: skip


def command(*words) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=ENVIRONMENT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """Two runs, where their Datasets are, and what was printed."""
    folder = tmp_path_factory.mktemp("circuits")
    runs = [folder / f"acronyms-{seed}" for seed in (1, 2)]
    for seed, run in enumerate(runs, start=1):
        command("-m", "dynamics.cli", "fit", "--preset=acronyms", "--out", run, *SHORT, f"--seed={seed}")
    before = (ROOT / "README.md").read_bytes()
    printed = command(ROOT / "scripts" / "ablate_circuit.py", *runs, "--out", folder / "out")
    assert (ROOT / "README.md").read_bytes() == before
    return runs, folder / "out", printed


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))  # where they import from each other
    spec = importlib.util.spec_from_file_location("ablate_circuit", ROOT / "scripts" / "ablate_circuit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


def rows(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_it_keeps_a_dataset_for_every_question_and_a_figure(ablated):
    _, out, printed = ablated
    names = {path.name for path in out.rglob("*.h5")}
    kinds = [f"{kind}-{values}.h5" for kind in ("first", "others", "all") for values in ("mean", "zero")]
    assert names == {"ranking.h5", "ranked-mean.h5", "along-mean.h5", *kinds}
    assert len(list(out.rglob("*.h5"))) == 2 * len(names)
    assert (out / "circuits.png").stat().st_size > 10_000
    head, _, *table = rows(printed)
    assert len(table) == 4
    assert all(len(row) == len(head) and all(row) for row in table)


def test_its_numbers_are_those_of_heads_set_to_zero_by_hand(ablated, script):
    runs, out, printed = ablated
    row = next(r for r in rows(printed) if r[:3] == ["acronyms", "zero", "accuracy"])
    shares = []
    for folder in runs:
        found = script.one_run(folder, out)
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


def test_heads_are_ranked_and_sized_on_prompts_that_are_not_tested(ablated, script):
    runs, out, _ = ablated
    found = script.one_run(runs[0], out)
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
    assert command(ROOT / "scripts" / "ablate_circuit.py", *runs, "--out", out) == printed
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")} == before
