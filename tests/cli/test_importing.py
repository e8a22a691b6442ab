"""Other people's checkpoints become trajectories that steps can be taken from."""

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import Callback, LightningModule, Trainer

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from checkpoints.values import differences
from dynamics.cli import main
from dynamics.recipe import RecipeError

# --- Lightning --------------------------------------------------------------------------------------------

BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


class Regression(LightningModule):
    """Two groups in another order than the module's, warm-up, a buffer; one tensor of the module is frozen."""

    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU())
            self.head = nn.Linear(width, 1)
        self.body[0].bias.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        loss = (self.head(self.body(batch)) - batch.sum(-1, keepdim=True)).square().mean()
        self.log("loss", loss)
        return loss

    def groups(self):
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [
            {"params": [p for _, p in named if p.ndim < 2], "lr": 0.02, "weight_decay": 0.0},
            {"params": [p for _, p in named if p.ndim == 2]},
        ]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.groups(), lr=0.01, weight_decay=0.3)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


class NamedGroups(Regression):
    """An optimizer made of named parameters, whose names torch keeps."""

    def groups(self):
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [{"params": [pair for pair in named if (pair[1].ndim < 2) is thin]} for thin in (True, False)]


class Saves(Callback):
    """The Trainer's own checkpoint before the first step and after every one."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / "begin.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"epoch=0-batch={batch_idx}.ckpt")


def trained(module, folder) -> Path:
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            gradient_clip_val=0.5,
            callbacks=[Saves(folder)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Regression, NamedGroups])
def test_a_step_replayed_from_lightnings_file_is_the_next_file_bit_for_bit(tmp_path, kind):
    files = trained(kind(), tmp_path / "files")
    recipe = dy.Recipe.from_lightning(kind(), clip=dy.ByNorm(0.5))
    hint = recipe.build_optimizer(recipe.model.parameters()) if kind is Regression else None
    run = Trajectory.from_lightning(files, tmp_path / "run", model=recipe.model, optimizer=hint)
    assert run.steps == (0, 1, 2, 3, 4, 5)
    assert run.optimizer_starts == (0,)
    assert run.verify() == []
    for step, batch in enumerate(BATCHES):
        assert dy.steps.replay(recipe, run.at(step), batch).differences(run.at(step + 1)) == []
    reached = dy.steps.reach(recipe, run, 5, BATCHES.__getitem__)
    assert reached.equals(run.last)
    assert run.at(4).optimizer.groups[0]["lr"] != run.at(1).optimizer.groups[0]["lr"]


def test_an_inner_model_is_imported_by_its_prefix(tmp_path):
    class Outer(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Regression()

        def training_step(self, batch, batch_idx):
            return self.model.head(self.model.body(batch)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.head.parameters(), lr=0.1, momentum=0.9)

    inner = Regression()
    hint = torch.optim.SGD(inner.head.parameters(), lr=1.0)
    files = trained(Outer(), tmp_path / "files")
    run = Trajectory.from_lightning(
        files / "epoch=0-batch=2.ckpt", tmp_path / "run", prefix="model.", model=inner, optimizer=hint
    )
    assert list(run.at(3).parameters) == [name for name, _ in inner.named_parameters()]
    assert list(run.at(3).optimizer.state) == ["head.weight", "head.bias"]
    run.at(3).restore(inner, hint)


# --- Hugging Face -----------------------------------------------------------------------------------------


def neox(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.GPTNeoXConfig(
        **shape, vocab_size=11, max_position_embeddings=16, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.GPTNeoXForCausalLM(config).to(dtype)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    for step in (0, 1000):
        neox(step).save_pretrained(folder / f"step{step}")
    return folder


def next_token(model, tokens):
    return F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def a_pair() -> dy.Contrast:
    base = torch.arange(8).reshape(2, 4)
    return dy.Contrast(base=base, source=base.flip(0) + 1, probe=base)


def recipe_for(model) -> dy.Recipe:
    return dy.Recipe(model, next_token, partial(torch.optim.AdamW, lr=0.01), max_grad_norm=1.0)


def patched(recipe, checkpoint):
    return dy.patch_gradients(recipe, checkpoint, [a_pair()], dy.sites.heads(recipe.model), next_token)


@pytest.mark.slow
def test_heads_are_patched_at_revisions_of_a_suite(suite, tmp_path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    run = Trajectory.from_huggingface(suite, ["step0", "step1000"], tmp_path / "run", load=load)
    assert run.steps == (0, 1000)
    assert run.verify() == []
    recipe = recipe_for(neox(7))
    for step in run.steps:
        assert run.at(step).differences(Checkpoint.capture(neox(step), step=step)) == []
        effects = patched(recipe, run.at(step).with_fresh_optimizer())
        directly = patched(recipe_for(neox(step)), None)
        assert effects["effect"].shape == (1, 4)
        assert bool((effects["effect"] != 0).all())
        assert effects.drop_attrs().equals(directly.drop_attrs())  # the recipe's optimizer, new


def test_revisions_are_taken_in_the_dtype_they_are_loaded_in(tmp_path):
    neox(3, torch.float16).save_pretrained(tmp_path / "suite/step3")
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    run = Trajectory.from_huggingface(tmp_path / "suite", "step3", tmp_path / "run", load=load)
    expected = {name: p.float() for name, p in neox(3, torch.float16).named_parameters()}
    assert differences(run.at(3).parameters, expected) == []
    with pytest.raises(RecipeError, match="checkpoint 3 holds no optimizer state"):
        patched(recipe_for(neox(0)), run.at(3))
    assert bool((patched(recipe_for(neox(0)), run.at(3).with_fresh_optimizer())["effect"] != 0).all())


def test_an_export_is_loaded_by_transformers(suite, tmp_path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    run = Trajectory.from_huggingface(suite, ["step1000"], tmp_path / "run", load=load)
    neox(0).config.save_pretrained(tmp_path / "back")
    run.export(1000, tmp_path / "back/model.safetensors")
    again, told = load(tmp_path / "back", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert Checkpoint.capture(again, step=1000).differences(run.at(1000)) == []


# --- the command line -------------------------------------------------------------------------------------


def dynamics(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dynamics", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_import_verify_and_export_go_together(tmp_path, capsys):
    for step in (499, 550):
        state = {"model.w": torch.full((2,), float(step)), "model.n": torch.tensor(step)}
        torch.save(state, tmp_path / f"6val_step_{step}_.pt")
    command = ["import", "state_dicts", str(tmp_path), "--out", str(tmp_path / "run"), "--prefix", "model."]
    said = f"2 checkpoints, steps 499 to 550, in {tmp_path / 'run'}.\n"
    done = dynamics(*command)
    assert (done.returncode, done.stdout) == (0, said)
    main(command)
    assert capsys.readouterr().out == said
    main(["verify", str(tmp_path / "run")])
    assert "2 files match their checksums.\nThey were imported" in capsys.readouterr().out
    file = tmp_path / "model.safetensors"
    done = dynamics("export", tmp_path / "run", "--step", "499", "--to", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file(file)["w"].tolist() == [499.0, 499.0]


def test_the_command_line_loads_the_model_that_a_folders_config_names(suite, tmp_path):
    main(["import", "huggingface", str(suite), "step0", "step1000", "--out", str(tmp_path / "run")])
    run = Trajectory.open(tmp_path / "run")
    assert run.at(1000).differences(Checkpoint.capture(neox(1000), step=1000)) == []


ERRORS = {
    "no files": ("import state_dicts absent --out new", "leads to no file"),
    "an option of others": ("import lightning . --out new --step x", "--step has no meaning for lightning"),
    "no revisions": ("import huggingface . --out new", "nothing to import"),
    "no model": ("import huggingface . bare-1 --out new", "transformers builds no model of bare-1"),
    "weights missing": (
        "import huggingface . cut-1 --out new",
        "has no weights for lm_head.weight of GPTNeoX",
    ),
    "a file there already": ("export run --step 1 --to m_1.pt", "nothing is overwritten"),
    "no such step": ("export run --step 2 --to m_2.pt", "Step 2 is not stored"),
    "no run of a study": ("believe run --site L0H0", "was imported"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    torch.save({"w": torch.ones(2)}, folder / "m_1.pt")
    Trajectory.from_state_dicts(folder / "m_1.pt", folder / "run")
    (folder / "bare-1").mkdir()
    torch.save({"w": torch.ones(2)}, folder / "bare-1/pytorch_model.bin")
    neox(0).config.save_pretrained(folder / "cut-1")
    config = json.loads((folder / "cut-1/config.json").read_text())
    (folder / "cut-1/config.json").write_text(json.dumps({**config, "architectures": ["GPTNeoXForCausalLM"]}))
    state = {name: t for name, t in neox(0).state_dict().items() if name != "lm_head.weight"}
    torch.save(state, folder / "cut-1/pytorch_model.bin")
    return folder


@pytest.mark.parametrize("why", ERRORS)
def test_an_error_is_one_line(workplace, monkeypatch, capfd, why):
    monkeypatch.chdir(workplace)
    command, message = ERRORS[why]
    before = sorted(os.listdir())
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main(command.split())
    assert left.value.code == 1
    complaint = capfd.readouterr().err.splitlines()
    assert message in complaint[-1]
    assert len(complaint) == 1 or why == "weights missing"  # of which transformers has much to say
    assert sorted(os.listdir()) == before
