"""The scripts that reproduce the seeds, on toys hardly trained and on a small random GPT-2."""

import importlib
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dynamics as dy
from checkpoints import Trajectory
from dynamics.config import AcronymsRun, FactsRun, IoiRun, ToyConfig
from dynamics.config.languages import LatePhasesConfig, OnePhaseConfig
from dynamics.config.parts import PhaseConfig, ScheduleConfig
from dynamics.tasks import words
from tests.zoo.word_level import save_gpt2

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # where they import from each other

N_LAYERS, N_HEADS = 2, 2
SHAPE = {"n_layers": N_LAYERS, "n_heads": N_HEADS, "d_model": 16, "d_head": 8, "d_mlp": 16}
BRIEF = PhaseConfig(steps=4, warmup=1)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each language, by its task's name."""
    folder = tmp_path_factory.mktemp("runs")
    shared = {"schedule": ScheduleConfig(per_decade=1, dense=1)}
    configs = {
        "ioi": IoiRun(model=ToyConfig(**SHAPE, n_ctx=14), phases=OnePhaseConfig(learn=BRIEF), **shared),
        "acronyms": AcronymsRun(model=ToyConfig(**SHAPE, n_ctx=7), phases=OnePhaseConfig(learn=BRIEF), **shared),
        "facts": FactsRun(
            model=ToyConfig(**SHAPE, n_ctx=5), phases=LatePhasesConfig(learn=BRIEF, late=BRIEF), **shared
        ),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in configs.items():
            dy.training.fit(config, folder / name)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with a random GPT-2 of two layers with two heads each, and its tokenizer."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def reproduce(monkeypatch, capsys, tmp_path):
    """Calls a script's main; returns what it printed and the figures it drew. The README is a copy."""

    def run(name: str, *arguments) -> tuple[str, set[str]]:
        readme = tmp_path / "README.md"
        readme.write_text("<!-- attribution: begin -->\n<!-- attribution: end -->\n")
        monkeypatch.setattr(importlib.import_module("into_readme"), "README", readme)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--out", str(tmp_path)])
        importlib.import_module(f"reproduce_seed_{name}").main()
        return capsys.readouterr().out, {p.stem for p in (tmp_path / name).glob("*.png")}

    return run


def subject(kind, runs, gpt2, task):
    return ["--model", gpt2] if kind == "model" else [runs / task]


KINDS = pytest.mark.parametrize("kind", ["run", "model"])
FAMILIES = ("residual_stream", "layer_outputs", "head_outputs", "qkv", "patterns")


@KINDS
def test_attribution_patching_cell_by_cell(kind, runs, gpt2, reproduce, tmp_path):
    more = ["--facts", runs / "facts", "--n", 4, "--readme"]
    printed, figures = reproduce("000", *subject(kind, runs, gpt2, "ioi"), *more)
    assert figures == {
        "attention", "attention_of_one_prompt", "facts_subject", "facts_words",
        *(f"{name}_{what}" for name in FAMILIES for what in ("attribution", "patching", "scatter")),
    }  # fmt: skip
    clean, corrupted = re.findall(r"^(?:clean|corrupted) logit difference ([+-]\S+)", printed, flags=re.M)
    assert float(clean) != float(corrupted)
    gap = re.findall(r"^gap (\S+)", printed, flags=re.M)[0]
    assert float(gap) == pytest.approx(float(clean) - float(corrupted), abs=0.011)
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| ")]
    length = 14 + (kind == "model")  # BOS
    sizes = [2 * length, 4 * length, 4, 12, 4]
    assert [int(row.split("|")[2]) for row in rows[1:]] == sizes
    assert printed.count("probability  answer") == 4


@KINDS
def test_a_framework_of_ones_own_task(kind, runs, gpt2, reproduce):
    printed, figures = reproduce("001", *subject(kind, runs, gpt2, "ioi"), "--n", 5)
    assert figures == {f"{c}_{what}" for c in ("order", "subject") for what in ("components", "heads")}
    assert printed.count("n = 5 (unit: example, in this run)") == 2
    sites = re.findall(r"^((?:attn_out|mlp_out) \d|attn\.z L\dH\d) +\S+ \[", printed, flags=re.M)
    assert len(sites) == 2 * (2 * N_LAYERS + N_LAYERS * N_HEADS)
    for line in re.findall(r"^heads: (.*)$", printed, flags=re.M):
        assert sorted(line.split(", ")) == ["L0H0", "L0H1", "L1H0", "L1H1"]


@KINDS
def test_the_acronym_circuit_letter_by_letter(kind, runs, gpt2, reproduce, tmp_path):
    listed = tmp_path / "acronyms.txt"
    listed.write_text(
        "The Chief Executive Officer (, CEO\nThe Bank Air Art (, BAA\nThe Data Day East (, DDE\n"
    )
    arguments = ["--acronyms", listed] if kind == "model" else ["--n", 3]
    printed, figures = reproduce("003", *subject(kind, runs, gpt2, "acronyms"), *arguments, "--readme")
    assert figures == {"residual_stream", "heads"}
    assert [p.name for p in (tmp_path / ".readme").iterdir()] == ["acronyms.png"]
    assert len(re.findall(r"^letter \d: clean -?\d+\.\d\d, all words shuffled", printed, flags=re.M)) == 3
    assert printed.count("n = 3 (unit: example, in this run)") == 3
    top = re.findall(r"^top heads: (.*)$", printed, flags=re.M)
    assert [sorted(line.split(", ")) for line in top] == 3 * [["L0H0", "L0H1", "L1H0", "L1H1"]]


@KINDS
def test_interchange_of_a_fact(kind, runs, gpt2, reproduce, tmp_path):
    base, source = "Spain", "Italy"
    if kind == "run":
        base, source = dy.tasks.load(Trajectory.open(runs / "facts").config).subjects[:2]
    named = ["--base", base, "--source", source]
    printed, figures = reproduce("004", *subject(kind, runs, gpt2, "facts"), *named)
    assert figures == {"tiles", "bars"}
    frame = pd.read_csv(tmp_path / "004" / "interchange.csv")
    assert len(frame) == 2 * 2 * N_LAYERS * 5
    assert set(frame["measure"]) == {words.COUNTRIES[base][0], words.COUNTRIES[source][0]}
    assert frame["patched"].between(0, 1).all()
    for country in (base, source):
        assert f"The capital of {country} is\n" in printed
    reach = frame[(frame["component"] == "ln1.normalized") & (frame["layer"] == 0)]
    moved = (reach["patched"] - reach["base"]).abs().groupby(reach["pos"]).max()
    np.testing.assert_array_equal(moved > 0, [False, False, False, True, False])  # the subject alone differs


def test_gradient_patching_step_by_step(tmp_path, reproduce):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dynamics.config import AliasConfig, PatchingConfig, PhasesConfig, PrimaryConfig, StudyConfig

        config = StudyConfig(
            task=AliasConfig(modulus=8, multipliers=(2, 3), train_multipliers=1),
            model=ToyConfig(**SHAPE),
            phases=PhasesConfig(pretrain=BRIEF, x1=BRIEF, x2=BRIEF, batch_size=16),
            patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
        )
        dy.training.fit(config, tmp_path / "aliases")
    printed, figures = reproduce("002", tmp_path / "aliases", "--first", 1, "--later", 2)
    assert figures == {
        "signals_by_position", "signals_by_head", "gradients_by_head", "gradients_by_component",
    }  # fmt: skip
    assert "Dt3, accuracy at step 9 -> 11" in printed
    assert (
        len(
            re.findall(
                r"^(?:a new AdamW|the run's own), (?:alias \d|all aliases): no step", printed, flags=re.M
            )
        )
        == 4
    )
    shares = dict(re.findall(r"^  (\S.*?) +([+-]\d+\.\d{4})$", printed, flags=re.M))
    assert float(shares["+ unembedding"]) == pytest.approx(1.0, abs=1e-3)  # all parameters
    both = printed.partition("resid_pre, forward and backward")[2]
    first = re.findall(r"^  resid_pre 0 +(\S+)$", both, flags=re.M)[0]
    assert float(first) == pytest.approx(1.0, abs=1e-3)  # no question has a tag, where the embeddings differ
    assert printed.count("no step at all") == 5


@pytest.mark.parametrize("verb", [dy.patch_activations, dy.attribute_activations])
def test_a_sweep_of_activations_over_training_is_the_verb_at_every_checkpoint(runs, verb):
    run = Trajectory.open(runs / "facts")
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
