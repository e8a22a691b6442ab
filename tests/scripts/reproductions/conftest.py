"""What the tests of the seeds share: a run of each language hardly trained, a small random GPT-2."""

import importlib

import pytest

from dynamics.config import AcronymsRun, FactsRun, IoiRun, ToyConfig
from dynamics.config.languages import IoiConfig, LatePhasesConfig, OnePhaseConfig
from dynamics.config.parts import PhaseConfig, ScheduleConfig
from scripts.shared import into_readme
from tests.zoo.word_level import save_gpt2

SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_head": 8, "d_mlp": 16}
BRIEF = PhaseConfig(steps=4, warmup=1)


@pytest.fixture(scope="session")
def language_runs(fitted, tmp_path_factory):
    """A run of each language, by its task's name."""
    folder = tmp_path_factory.mktemp("runs")
    shared = {"schedule": ScheduleConfig(per_decade=1, dense=1)}
    configs = {
        "ioi": IoiRun(
            task=IoiConfig(n_prompts=500),
            model=ToyConfig(**SHAPE, n_ctx=14),
            phases=OnePhaseConfig(learn=BRIEF),
            **shared,
        ),
        "acronyms": AcronymsRun(model=ToyConfig(**SHAPE, n_ctx=7), phases=OnePhaseConfig(learn=BRIEF), **shared),
        "facts": FactsRun(
            model=ToyConfig(**SHAPE, n_ctx=5), phases=LatePhasesConfig(learn=BRIEF, late=BRIEF), **shared
        ),
    }  # fmt: skip
    for name, config in configs.items():
        fitted(config, folder / name)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A folder with a random GPT-2 of two layers with two heads each, and its tokenizer."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(params=["run", "model"])
def subject(request, language_runs, gpt2):
    """The arguments that name a run of a task, or the small GPT-2 in its place."""
    return lambda task: [language_runs / task] if request.param == "run" else ["--model", gpt2]


@pytest.fixture
def reproduce(monkeypatch, capsys, tmp_path):
    """Calls a script's main; returns what it printed and the figures it drew. The README is a copy."""

    def run(name: str, *arguments) -> tuple[str, set[str]]:
        readme = tmp_path / "README.md"
        readme.write_text("<!-- attribution: begin -->\n<!-- attribution: end -->\n")
        monkeypatch.setattr(into_readme, "HOME", tmp_path)
        importlib.import_module(f"scripts.reproductions.seed_{name}").main(
            [*map(str, arguments), "--out", str(tmp_path)]
        )
        return capsys.readouterr().out, {p.stem for p in (tmp_path / name).glob("*.png")}

    return run
