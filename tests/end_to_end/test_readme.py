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
from checkpoints import Checkpoint, TrajectoryWriter, log_spaced
from dynamics.config import ToyConfig
from dynamics.models.toy import ToyTransformer
from tests.zoo.comparison_models import short_run
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


def test_the_example_on_a_users_own_model_runs():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.encoder(x).relu())

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    net = Classifier()
    names = {
        "net": net,
        "loss": loss,
        "measure": loss,
        "optimizer": torch.optim.AdamW(net.parameters(), lr=1e-3),
        **{
            name: (torch.randn(5, 3), torch.randint(2, (5,)))
            for name in ("unreliable", "reliable", "questions")
        },
    }
    lines = block("dy.patch_factors").strip().splitlines()
    names["dy"] = pytest.importorskip("dynamics")
    names["shown"] = shown = []
    calls = [line for line in lines if line.startswith(("dy.patch_", "dy.attribute_"))]
    assert len(calls) == 5
    exec(
        "\n".join(f"shown.append({line.split('  #')[0]})" if line in calls else line for line in lines), names
    )
    for result in shown:
        assert result["site"].values.tolist() in (["encoder", "head"], ["encoder"])
        assert all(result[name].notnull().all() for name in ("effect", "attribution") if name in result)


def test_the_example_of_an_account_runs():
    torch.manual_seed(0)
    net = nn.Linear(3, 4)
    batches = {
        name: (torch.randn(8, 3), torch.arange(8) % 4) for name in ("unreliable", "reliable", "questions")
    }

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    example = block("attribute_training")
    recipe = dy.Recipe(net, loss, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    names = {
        "dy": dy,
        "recipe": recipe,
        "state": None,
        "parts": dy.sites.matching(net, {"all": "*"}),
        "measure": loss,
        **batches,
    }
    exec(example, names)
    account = names["account"]
    assert account["source"].values.tolist() == ["0", "1", "2", "3", "before", "decay"]
    written = account["attribution"].sum(("step", "source", "site"))
    change = account["value"].isel(step=-1) - account["value"].isel(step=0)
    assert float(abs(written - change).max()) < 1e-3 * float(abs(change).max())


@pytest.mark.slow
def test_the_example_of_two_checkpoints_of_a_run_runs(tmp_path):
    example = block("CheckpointPair")
    run = short_run(tmp_path / "run")
    task = dy.tasks.load(run.config)
    recipe, contrasts = task.recipe(), task.contrasts()
    names = {
        "dy": dy,
        "run": run,
        "recipe": recipe,
        "contrasts": contrasts,
        "questions": contrasts[0].probe,
        "parts": dy.sites.components(recipe.model),
        "places": dy.sites.activations(recipe.model, "blocks.*.hook_resid_pre"),
        "measure": dy.measures.correct_logit,
    }
    for stored, step in zip(("3000", "4000", "4500", "5000"), (0, 2, 4, 6), strict=True):
        example = example.replace(stored, str(step))
    exec(example, names)
    assert names["grid"].sizes["source_step"] == 2
    assert all(names[name]["effect"].notnull().all() for name in ("carried", "flowing", "grid"))
    assert names["divided"]["attribution"].notnull().all()


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


def test_a_bare_loop_is_recorded_and_its_checkpoints_compared(tmp_path, monkeypatch):
    import dynamics as dy
    from checkpoints import Trajectory

    third = block("TrajectoryWriter.create")
    fourth = block("batch_of")
    net = nn.Linear(3, 9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = [torch.randn(5, 3) for _ in range(12)]

    def train(net, optimizer, batch):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()

    monkeypatch.chdir(tmp_path)
    exec(third, {"net": net, "optimizer": optimizer, "batches": batches, "train": train})
    run = Trajectory.open("runs/mine")
    assert run.steps == tuple(step for step in log_spaced(1000, 5) if step < 12)

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
    run = Trajectory.open(tmp_path / "answers")
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
