"""What is typed wrong is said in the words it is typed in, with what was probably meant."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dynamics.cli import commands, main
from dynamics.config.checks import did_you_mean


def refused(capsys, command: str) -> str:
    """What a command that cannot be parsed prints on stderr."""
    with pytest.raises(SystemExit) as left:
        main(command.split())
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("fit", "--out"),
        ("study aliases", "--out"),
        ("sweep RUN", "--out"),
        ("believe", "RUN, --site"),
        ("export RUN", "--step, --to"),
        ("import lightning files", "--out"),
        ("show", "RUN|FILE.h5"),
        ("", "COMMAND"),
    ],
)
def test_what_is_missing_is_named_as_it_is_typed(capsys, command, missing):
    assert refused(capsys, command).endswith(f"the following arguments are required: {missing}\n")


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        ("fit --out x --model.n_layer 3", "--model.n_layers"),
        ("fit --out x --task.modulos=8", "--task.modulus"),
        ("fit --out x --preset fact", "facts"),
        ("fit --ou x", "--out"),
        ("vrify x", "verify"),
        ("sweep x --out y --levels head", "heads"),
        ("sweep x --out y --measures correct_logits", "correct_logit"),
        ("sweep x --out y --verb patch_gradient", "patch_gradients"),
        ("believe x --sight y", "--site"),
        ("believe x --site y --optimizer old", None),
    ],
)
def test_a_near_miss_is_suggested_and_nothing_is_taken_by_its_prefix(
    capsys, tmp_path, monkeypatch, command, meant
):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, command)
    assert ("Did you mean" in said) == (meant is not None)
    assert meant is None or f"Did you mean {meant!r}?" in said
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_a_config_file_is_suggested_too(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {n_layer: 3}")
    said = refused(capsys, f"fit --out {tmp_path / 'run'} --config {tmp_path / 'mine.yaml'}")
    assert "Did you mean '--model.n_layers'?" in said
    assert "keys of model: activation, attn_only, " in said


def test_a_value_that_does_not_fit_is_said_of_the_option(capsys):
    assert "--x2-step:\n" in refused(capsys, "believe x --site y --x2-step late")


@pytest.mark.parametrize("spelling", ["--x2-step", "--x2_step"])
def test_both_spellings_of_a_step_within_x2_are_taken(spelling, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["believe", str(tmp_path / "no-run"), "--site", "attn 0", spelling, "3"])
    assert left.value.code == 1  # parsed; there is no run
    assert "is no run" in capsys.readouterr().err


def test_help_has_one_line_on_each_subcommand(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name in commands.COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line.removeprefix(f"  {name}").split()) > 3


def test_every_module_with_a_run_is_a_subcommand():
    folder = Path(commands.__file__).parent
    runnable = {
        path.stem
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "run"
    }
    assert runnable == {command.__name__.rpartition(".")[2] for command in commands.COMMANDS.values()}


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_each_subcommand_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: dynamics {name} ")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fit", ["acronyms", "default", "facts", "ioi", "seed", "smoke", "bf16-mixed", "correct_log_prob"]),
        ("sweep", ["patch_updates", "attribute_step", "up_to_layer", "centred_logit", "stored", "fresh"]),
        ("believe", ["stored", "fresh"]),
        ("import", ["state_dicts", "lightning", "safetensors", "huggingface"]),
    ],
)
def test_values_that_can_be_listed_are_in_the_help(capsys, name, values):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    assert [value for value in values if value not in said] == []


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("dynamics ")


def test_the_module_is_run_as_the_package():
    done = subprocess.run(
        [sys.executable, "-m", "dynamics", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("dynamics ")


@pytest.mark.parametrize(
    ("word", "known", "question"),
    [
        ("attn0", ["attn 0", "attn 1", "mlp 0"], " Did you mean 'attn 0'?"),
        ("l0h2", ["L0H2", "L1H1"], " Did you mean 'L0H2'?"),
        ("head", ["layers", "heads"], " Did you mean 'heads'?"),
        ("zzz", ["layers", "heads"], ""),
        ("head", [], ""),
    ],
)
def test_the_nearest_spelling_is_asked_for(word, known, question):
    assert did_you_mean(word, known) == question
