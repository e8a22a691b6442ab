"""The Python of the README and of the documentation's pages runs as it stands there."""

import dataclasses
import re
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint, TrajectoryWriter
from dynamics.config import ToyConfig
from dynamics.models.toy import ToyTransformer
from tests.zoo.word_level import save_gpt2

ROOT = Path(__file__).parents[2]


def block(words: str) -> str:
    """The one block of Python with these words; a page may repeat another's."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [b for page in pages for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    (found,) = {block for block in blocks if words in block}
    return found


@pytest.mark.slow
def test_the_ten_lines_run_on_a_finished_run(tmp_path, monkeypatch, capsys):
    from dynamics.config import (
        AliasConfig,
        PatchingConfig,
        PhaseConfig,
        PhasesConfig,
        PrimaryConfig,
        StudyConfig,
        ToyConfig,
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dynamics.training import fit

    short = PhaseConfig(6)
    config = StudyConfig(
        task=AliasConfig(modulus=8, multipliers=(2, 3), train_multipliers=1),
        model=ToyConfig(n_heads=2, d_model=16, d_head=8, d_mlp=16),
        phases=PhasesConfig(pretrain=short, x1=short, x2=short, batch_size=16),
        patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
    )
    fit(config, tmp_path / "runs" / "aliases")
    monkeypatch.chdir(tmp_path)
    first = block("heads.png")
    assert len([line for line in first.splitlines() if line]) <= 12
    for _ in range(2):  # what they write is replaced the second time
        exec(first.replace("4510", "14"), {})
    assert "L1H1" in capsys.readouterr().out
    assert (tmp_path / "heads.png").exists()
    assert (tmp_path / "heads.h5").exists()


def test_the_example_of_a_task_of_ones_own_runs_on_a_hugging_face_model(tmp_path, capsys):
    folder = save_gpt2(tmp_path)
    names = {
        "dy": pytest.importorskip("dynamics"),
        "gpt2": transformers.AutoModelForCausalLM.from_pretrained(folder),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder),
    }
    example = block("target_tokens")
    exec(example, names)
    printed = capsys.readouterr().out
    assert names["patched"].sizes == {"example": 1, "site": 4}
    assert names["moved"]["measure"].values.tolist() == [" John", " Mary"]
    assert printed.count("attn.z L1H1") == 1 + 2  # the table, and twice in the frame
    assert "probability" in printed


@pytest.mark.slow
def test_the_example_of_a_fact_being_written_runs_on_a_short_run(tmp_path, monkeypatch):
    from checkpoints import Trajectory
    from dynamics.config import FactsConfig, FactsRun, LatePhasesConfig, PhaseConfig, ToyConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dynamics.training import fit

    config = FactsRun(
        task=FactsConfig(n_subjects=8, n_late=2),
        model=ToyConfig(n_layers=1, n_heads=2, d_model=16, d_head=8, d_mlp=16, n_ctx=5),
        phases=LatePhasesConfig(learn=PhaseConfig(8), late=PhaseConfig(6), batch_size=16),
    )
    fit(config, tmp_path / "runs" / "facts")
    monkeypatch.chdir(tmp_path)
    example = block("statements_at")
    names = {"dy": pytest.importorskip("dynamics"), "Trajectory": Trajectory}
    exec(example, names)
    assert names["written"].sizes["example"] == 2
    assert names["written"]["effect"].notnull().all()


def test_the_checkpoints_of_a_loop_of_ones_own_are_compared(tmp_path):
    fourth = block("comparison.when(along")

    def train(net, optimizer, batch):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()

    class Answers(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Embedding(9, 9)

        def forward(self, tokens):
            return self.inner(tokens)

    model = Answers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    questions = dy.Batch(torch.arange(9)[:, None], torch.zeros(9, dtype=torch.int64), torch.arange(9))
    with TrajectoryWriter.create(tmp_path / "answers", {}) as writer:
        for step in range(4):
            writer.append(Checkpoint.capture(model, optimizer, step=step))
            train(model, optimizer, questions.tokens)
    run = dy.Trajectory.open(tmp_path / "answers")
    names = {
        "dy": dy,
        "run": run,
        "recipe": dy.Recipe(model),
        "questions": questions,
        "sites": dy.sites.parameters(model),
        "before": run.at(0),
        "after": run.at(3),
        "batch_of": None,
    }
    exec(fourth, names)
    moved = (run.at(3).parameters["inner.weight"] - run.at(0).parameters["inner.weight"]).norm()
    assert float(names["pair"]["weights"]["distance"][0]) == pytest.approx(float(moved))
    along = names["along"]
    assert along["weights"]["step"].values.tolist() == [1, 2, 3]
    assert along["updates"]["step"].values.tolist() == [2, 3]
    assert names["event"].sizes == {"example": 1}


def test_the_example_of_a_circuit_runs_on_a_small_toy():
    example = block("dy.sites.outside")
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
