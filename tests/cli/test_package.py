"""The command line as a user meets it."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from checkpoints import Trajectory
from dynamics import results
from dynamics.cli import main
from dynamics.tasks import AliasTask
from tests.cli.calling import TINY, dynamics, succeed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(made_once) -> Path:
    """What the study leaves, and what it printed, whatever the folder is called; not to be written into."""

    def study(folder: Path) -> None:
        printed = succeed("study", "aliases", "--out", folder, *TINY)
        (folder / "printed.txt").write_text(printed.replace(str(folder), "RUN"))

    return made_once("study", study)


def test_a_study_leaves_everything_it_promises(run):
    written = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert {
        "config.yaml",
        "manifest.json",
        "metrics.csv",
        "findings.md",
        "results/answers.h5",
        "results/patch_gradients.h5",
        "results/patch_updates.h5",
        "figures/accuracies.png",
        "figures/components.png",
        "figures/heads.png",
        "figures/sites_by_step.png",
        "figures/stored_and_fresh.png",
    } <= written


def test_a_study_prints_the_table_and_the_findings(run):
    printed = (run / "printed.txt").read_text()
    assert "recovery" in printed.splitlines()[1]
    assert "attn 0" in printed
    assert "In this run, late in X2" in printed
    assert (run / "findings.md").read_text().splitlines()[0] in printed


def test_a_study_keeps_what_each_alias_answered_as_training_counted_it(run):
    kept = results.load(run / "results" / "answers.h5")
    assert {"config", "date", "quantity"} <= set(json.loads(kept.attrs["provenance"]))
    answers = kept["accuracy"]
    metrics = pd.read_csv(run / "metrics.csv").set_index("step")
    assert answers["step"].values.tolist() == list(Trajectory.open(run).steps)
    for name in ("Dt3", "Df4"):
        counted = metrics[f"{name}_accuracy"].dropna()
        steps = sorted(set(counted.index) & set(answers["step"].values.tolist()))
        of_set = answers.isel(example=answers["set"].values == name).mean("example").sel(step=steps)
        np.testing.assert_allclose(of_set, counted.loc[steps], atol=1e-6)


def test_results_can_be_read_by_anything_that_reads_hdf5(run):
    with h5py.File(run / "results" / "patch_gradients.h5") as file:
        assert file["effect"].shape == (2, 2, 2, 4, 14)  # optimizer, step, measure, example, site
        assert json.loads(file.attrs["provenance"])["config"]["task"]["modulus"] == 8


def test_a_study_called_again_computes_nothing_anew(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (again / "results").iterdir()}
    printed = succeed("study", "aliases", "--out", again, *TINY)
    assert printed.replace(str(again), "RUN") == (run / "printed.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in (again / "results").iterdir()} == before


def test_a_new_process_replays_every_stored_neighbour_bit_for_bit(run):
    command = [sys.executable, "-m", "dynamics", "verify", str(run)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = len(Trajectory.open(run).steps) - 1
    assert f"{pairs} of {pairs} stored neighbours replay bit for bit." in printed


def test_verify_names_a_damaged_file_and_fails(run, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", run, copy], check=True)
    victim = sorted((copy / "trajectory").glob("*.h5"))[3]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = dynamics("verify", copy)
    assert done.returncode == 1
    assert victim.name in done.stdout


def test_another_config_is_refused_in_a_used_folder(run):
    done = dynamics("study", "aliases", "--out", run, *TINY, "--seed=4")
    assert done.returncode == 1
    assert "holds another run" in done.stderr
    assert "Nothing was overwritten" in done.stderr


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path):
    done = dynamics("verify", tmp_path)
    assert done.returncode == 1
    assert "no run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", ["--task.modulos=8", "--phases.x1.lenght=3"])
def test_an_unknown_config_key_is_refused_and_the_valid_ones_are_listed(tmp_path, wrong):
    done = dynamics("fit", "--out", tmp_path / "run", wrong)
    assert done.returncode == 2
    assert wrong.partition("=")[0] in done.stderr
    assert ("modulus" if "task" in wrong else "learning_rate") in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_a_config_file_is_refused_and_the_valid_ones_are_listed(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: {modulos: 8}")
    done = dynamics("fit", "--out", tmp_path / "run", "--config", tmp_path / "mine.yaml")
    assert done.returncode == 2
    assert "modulos" in done.stderr
    assert "modulus" in done.stderr


def test_an_impossible_config_says_what_to_change(tmp_path):
    done = dynamics("fit", "--out", tmp_path / "run", "--task.modulus=6")
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: task.modulus is 6; below 8")


def test_training_that_diverges_stops_with_an_error_and_a_good_trajectory(tmp_path):
    done = dynamics("fit", "--out", tmp_path / "run", *TINY, "--phases.x1.learning_rate=1e30")
    assert done.returncode == 1
    assert "NonFiniteLoss: The loss is" in done.stderr
    run = Trajectory.open(tmp_path / "run")
    assert run.verify() == []
    assert 20 <= run.steps[-1] < 40


def stopped(words: list[str], told: Path) -> None:
    """`dynamics WORDS`, to which Ctrl-C comes as it draws the batch of step 31; its complaint goes to a file."""
    # A background job of a shell inherits SIGINT ignored; a terminal's does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    honest = AliasTask.batch

    def batch(self, step):
        if step == 31:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(self, step)

    AliasTask.batch = batch
    with told.open("w") as file, redirect_stderr(file):
        main(words)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_ctrl_c_leaves_a_run_that_opens_and_the_same_command_finishes_it(tmp_path, run):
    words, told = ["fit", "--out", str(tmp_path / "run"), *TINY], tmp_path / "told"
    process = multiprocessing.get_context("fork").Process(target=stopped, args=(words, told))
    process.start()
    process.join()
    assert process.exitcode == 130
    assert "the same command goes on from there" in told.read_text()
    left = Trajectory.open(tmp_path / "run")
    assert left.verify() == []
    assert 30 <= left.steps[-1] < 60
    assert "60" in succeed("fit", "--out", tmp_path / "run", *TINY)
    whole = Trajectory.open(run)
    assert Trajectory.open(tmp_path / "run").steps == whole.steps
    assert Trajectory.open(tmp_path / "run").last.differences(whole.last) == []


def test_help_is_quick_and_needs_no_torch():
    code = (
        "import sys, atexit; from dynamics.cli import main;"
        "atexit.register(lambda: print('torch' in sys.modules)); main({})"
    )
    for words in (["--help"], ["fit", "--help"], ["sweep", "--help"]):
        command = [sys.executable, "-c", code.format(words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: dynamics ")
        assert done.stdout.splitlines()[-1] == "False"


# --- the languages ----------------------------------------------------------------------------------------

SHORT = [
    "--model.n_layers=1",
    "--model.n_heads=2",
    "--model.d_model=16",
    "--model.d_head=8",
    "--model.d_mlp=16",
    "--schedule.per_decade=2",
    "--schedule.dense=2",
]


@pytest.mark.parametrize(
    ("name", "task", "steps"),
    [
        ("ioi", ["--task.n_names=8", "--task.n_prompts=100"], 8),
        ("acronyms", ["--task.n_words=1", "--task.n_prompts=100"], 8),
        ("facts", ["--task.n_subjects=8", "--task.n_late=2", "--phases.late.steps=4"], 12),
    ],
)
def test_a_language_is_trained_by_its_preset_and_verified(tmp_path, name, task, steps):
    chosen = [f"--preset={name}", *SHORT, *task, "--phases.learn.steps=8"]
    printed = succeed("fit", "--out", tmp_path / "run", *chosen, "--seed=4")
    run = Trajectory.open(tmp_path / "run")
    assert printed.startswith(f"{len(run)} checkpoints, steps 0 to {steps}, in ")
    assert (run.config["task"]["name"], run.config["seed"]) == (name, 4)
    assert f"{len(run) - 1} of {len(run) - 1} stored neighbours replay bit for bit" in succeed(
        "verify", run.path
    )
    by_key = succeed("fit", "--out", tmp_path / "again", f"--task.name={name}", *chosen[1:], "--seed=4")
    assert by_key.startswith(f"{len(run)} checkpoints")
    assert Trajectory.open(tmp_path / "again").last.differences(run.last) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task.name=poems"], "task.name is 'poems'; it must be one of 'ioi', 'acronyms', 'facts'"),
        (["--preset=ioi", "--task.modulus=8"], "modulus"),
        (["--preset=facts", "--task.n_late=40"], "task.n_late is 40; it must be 1..38"),
    ],
)
def test_a_language_that_cannot_be_is_refused(tmp_path, words, message):
    done = dynamics("fit", "--out", tmp_path / "run", *words)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_language_is_swept_compared_and_believed_where_no_aliases_are_needed(tmp_path):
    run = tmp_path / "run"
    small = ["--task.n_subjects=8", "--task.n_late=2", "--phases.learn.steps=10", "--phases.late.steps=5"]
    succeed("fit", "--out", run, "--preset=facts", *SHORT, *small)
    stored = [step for step in Trajectory.open(run).steps if 10 <= step < 15]
    swept = succeed("sweep", run, "--out", tmp_path / "swept", "--levels=heads", "--measures=correct_logit")
    assert f"2 optimizer, {len(stored)} step, 1 measure, 6 example, 2 site" in swept
    compared = succeed("compare", run, "--from", 10, "--to", 13)
    assert "contrasts whose answers changed most" in compared
    assert (run / "results/compare-10-13/logits.h5").exists()
    along = succeed("compare", run, "--every", "--steps", 5, 10, 12, 14)
    assert along.startswith("change points in this run\n")
    assert "accuracy late_stated" in along
    head, *lines = succeed("believe", run, "--site=attn 0", "--x2-step=1", "--impulse=2").splitlines()
    assert head.startswith("attn 0, Late step 1, fresh optimizer")
    needs = [line for line in lines if "not made: it needs aliases, the run is of the task 'facts'" in line]
    assert (len(lines), len(needs)) == (20, 5)
