"""The scripts of paths from the command line, in miniature; none touches the README unasked."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import dynamics as dy
from dynamics import results
from dynamics.config import ToyConfig
from dynamics.models.toy import ToyTransformer
from tests.end_to_end.test_analysis_scripts import rows_of
from tests.end_to_end.test_readme import blocks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # where they import from each other
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = [
    "--model.n_layers=2",
    "--model.n_heads=2",
    "--model.d_model=16",
    "--model.d_head=8",
    "--model.d_mlp=16",
]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def call(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    return done.stdout


# --- what they compute ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edges():
    return dy.sites.paths(ToyTransformer(ToyConfig(n_layers=2, n_heads=2, d_model=8, d_head=4, d_mlp=8), 5))


def test_random_edges_are_as_many_and_differ(edges):
    circuits, draw = script("circuits"), np.random.default_rng(0)
    drawn = circuits.at_random(edges, 20, draw)
    assert len(set(drawn)) == len(drawn) == 20
    assert set(drawn) < {site.label for site in edges}
    assert drawn != circuits.at_random(edges, 20, draw)


def test_random_ways_lead_through_but_for_the_last(edges):
    from dynamics.attribution.circuits import leading_through

    circuits = script("circuits")
    for seed in range(5):
        drawn = circuits.by_ways(edges, 15, np.random.default_rng(seed))
        assert len(set(drawn)) == len(drawn) == 15
        ways = leading_through(tuple(label.split(" -> ")) for label in drawn)
        assert len(ways) >= 15 - 4  # the longest way has five edges


def test_kept_is_one_for_the_clean_and_zero_for_the_corrupted_prompts():
    dims = ("example", "site")
    found = xr.Dataset(
        {
            "patched": (dims, [[5.0, 1.0, 2.0], [9.0, -1.0, 4.0]]),
            "base": ("example", [5.0, 9.0]),
            "source": ("example", [1.0, -1.0]),
        }
    )
    np.testing.assert_allclose(script("circuits").kept(found), [1, 0, 3 / 7])


def test_half_is_where_half_of_the_way_is_gone():
    half = script("writes_and_reads").half
    across = np.arange(12.0)
    assert half(across, np.array([0, 0, 0, 1, 2, 4, 6, 8, 9, 10, 10, 10.0])) == 6
    assert half(across, -np.array([0, 0, 0, 1, 2, 4, 6, 8, 9, 10, 10, 10.0])) == 6


def test_the_readmes_example_runs():
    (example,) = [block for block in blocks() if "dy.sites.outside" in block]
    model = ToyTransformer(ToyConfig(n_layers=2, n_heads=2, d_model=8, d_head=4, d_mlp=8, n_ctx=3), 5)
    rows = (torch.tensor([[1, 2, 3]]), torch.tensor([2]), torch.tensor([4]), torch.tensor([[0]]))
    clean = dy.Batch(*rows)
    corrupted = dataclasses.replace(clean, tokens=torch.tensor([[1, 0, 3]]))
    pairs = [dy.Contrast(corrupted, clean, coords={"example": "one"})]
    names = {
        "dy": dy,
        "recipe": dy.Recipe(model),
        "state": None,
        "task": types.SimpleNamespace(contrasts=lambda: pairs),
    }
    exec(example, names)
    assert names["one_by_one"].sizes["site"] == 4
    rest = names["rest"].edges
    assert len(rest) == len(names["scores"]["site"]) - len(names["kept"])
    assert names["alone"]["base"].item() == pytest.approx(names["one_by_one"]["source"].item())


# --- from the command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two facts runs in miniature, seeds 1 and 2."""
    folders = [tmp_path_factory.mktemp("facts") / f"facts-{seed}" for seed in (1, 2)]
    short = [
        "--phases.learn.steps=150",
        "--phases.late.steps=70",
        "--task.n_subjects=6",
        "--task.n_late=2",
        *SMALL,
    ]
    for seed, folder in enumerate(folders, 1):
        call("-m", "dynamics.cli", "fit", "--preset", "facts", "--out", folder, f"--seed={seed}", *short)
    return folders


@pytest.mark.slow
def test_circuits_writes_a_table_of_what_it_measured(runs, tmp_path):
    before = (ROOT / "README.md").read_text()
    out = tmp_path / "edges"
    (row,) = rows_of(call(ROOT / "scripts" / "circuits.py", *runs, "--out", out))[2:]
    assert row[:2] == ["facts", "2"]
    assert row[2].endswith(f" of {len(dy.sites.paths(dy.tasks.load(_config(runs[0])).model()))}")
    circuits = script("circuits")
    shares = []
    for folder in sorted(out.iterdir()):
        if folder.is_dir():
            scores, found, tested = (
                results.load(folder / f"{n}.h5") for n in ("scores", "found", "circuits")
            )
            enough = circuits.kept(found) >= circuits.WANTED
            chosen = int(np.argmax(enough)) if enough.any() else -1
            shares.append(circuits.kept(tested)[chosen])
            assert not set(scores["example"].values) & set(tested["example"].values)
    assert f"{np.mean(shares):+.2f}" in row[4]
    assert (out / "edges.png").exists()
    assert (ROOT / "README.md").read_text() == before


def _config(folder: Path):
    from checkpoints import Trajectory

    return Trajectory.open(folder).config


@pytest.mark.slow
def test_when_causal_has_a_line_for_each_layer_and_each_circuit(runs, tmp_path):
    text = call(ROOT / "scripts" / "when_causal.py", *runs, "--out", tmp_path)
    rows = [row for row in rows_of(text) if row[0] == "facts"]
    assert [row[1] for row in rows[:2]] == ["0", "1"]
    steps = [int(row[1]) for row in rows[2:]]
    assert steps == sorted(steps)
    assert len(steps) == 5
    assert all(step < 150 for step in steps)
    assert (tmp_path / "causal.png").exists()


@pytest.mark.slow
def test_writes_and_reads_has_a_line_for_facts_and_one_for_aliases(runs, tmp_path):
    tiny = [
        "--preset=smoke",
        "--task.modulus=8",
        "--task.multipliers=[2, 3, 4]",
        "--task.train_multipliers=2",
    ]
    call("-m", "dynamics.cli", "fit", "--out", tmp_path / "aliases", "--phases.x2.steps=80", *tiny)
    text = call(
        ROOT / "scripts" / "writes_and_reads.py",
        *runs,
        "--aliases",
        tmp_path / "aliases",
        "--out",
        tmp_path / "out",
    )
    fact, alias = rows_of(text)[2:]
    assert fact[:2] == ["fact", "4"]
    assert alias[0] == "alias"
    assert (tmp_path / "out" / "writes.png").exists()
