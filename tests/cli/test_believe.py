"""`dynamics believe` as a user meets it: ten checks of one site, or one line that says what is wrong."""

import re
import subprocess
from pathlib import Path

import pytest

from checkpoints import Trajectory
from dynamics import results
from dynamics.studies import ten_checks
from tests.cli.calling import dynamics

pytestmark = pytest.mark.slow

CHECK = re.compile(r"^ {0,5}(holds|fails|open|-)  (\S.*)$")
BAR = re.compile(r".*\d+%\|")
"""A progress bar, of calls that take longer than some seconds."""
IMPULSE = ("--impulse", "2")


@pytest.fixture
def runs(tiny_runs) -> list[Path]:
    return tiny_runs


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a call that failed without a traceback."""
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_a_run_gets_ten_checks_each_with_its_figures(runs, tmp_path):
    before = files(runs[0])
    done = dynamics("believe", runs[0], "--site", "attn 0", *IMPULSE, "--out", tmp_path / "checks.h5")
    assert done.returncode == 0, done.stderr
    assert [part for part in re.split(r"[\r\n]", done.stderr) if part.strip() and not BAR.match(part)] == []
    head, *lines = done.stdout.splitlines()
    assert head == "attn 0, X2 step 10, fresh optimizer; mean [95 % interval], unit: alias, in this run"
    assert len(lines) == 20
    checks = [CHECK.match(line) for line in lines[::2]]
    assert all(checks)
    assert [check[1] for check in checks[8:]] == ["-", "-"]
    assert len({check[2] for check in checks}) == 10
    assert all(line.startswith(" " * 8) and line[8] != " " for line in lines[1::2])
    assert len(re.findall(r"[+-]\d+\.\d+ \[[+-]\d+\.\d+, [+-]\d+\.\d+\]", done.stdout)) == 13
    assert "2 steps later" in done.stdout
    assert files(runs[0]) == before
    kept = results.load(tmp_path / "checks.h5")
    assert f"{kept.attrs['site']}, {kept.attrs['at']}" == head
    assert kept["check"].values.tolist() == [check[2] for check in checks]
    assert kept["figure"].values.tolist() == [line.strip() for line in lines[1::2]]


def test_the_command_prints_what_the_battery_says_of_several_runs(runs):
    chosen = ("--site", "W_E", "--x2_step", "3", "--optimizer", "stored", *IMPULSE)
    done = dynamics("believe", *runs, *chosen)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head == "W_E, X2 step 3, stored optimizer; mean [95 % interval], unit: run, 2 of them"
    assert len(lines) == 20
    assert re.search(r"carry \d+% of the site's effect; their second moment is", lines[-1])
    found = ten_checks([Trajectory.open(folder) for folder in runs], "W_E", 3, "stored", 2)
    for i, check in zip(range(2), found, strict=False):
        assert lines[2 * i : 2 * i + 2] == [f"{check.verdict:>6}  {check.name}", f"        {check.figure}"]


def test_an_unknown_site_is_one_line_that_lists_the_sites(runs):
    done = dynamics("believe", runs[0], "--site", "attn 9", *IMPULSE)
    line = complaint(done)
    assert line.startswith("SiteError: no site 'attn 9'; there are block 0, block 1, embed, ")
    assert all(f" {label}" in line for label in ("attn 1", "L1H1", "QK L0H0", "W_U", "+ block 0"))
    assert len(done.stdout.splitlines()) <= 1


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    assert "is no run" in complaint(dynamics("believe", tmp_path / "nothing", "--site", "attn 0"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--x2_step", "500"], "found x2_step=500 "),
        (["--x2_step", "-1", *IMPULSE], "found x2_step=-1 "),
        (["--x2_step", "18", *IMPULSE], "found x2_step=18 and impulse=2; "),
        (["--impulse", "0"], "found x2_step=10 and impulse=0; "),
    ],
)
def test_a_step_or_an_impulse_that_does_not_fit_the_run_is_one_line_at_once(runs, wrong, said):
    done = dynamics("believe", runs[0], "--site", "attn 0", *wrong)
    assert complaint(done).startswith(f"ConfigError: {said}")
    assert not any(CHECK.match(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(["--optimizer", "old"], "old"), (["--x2_step", "late"], "late"), (["--sight", "embed"], "sight")],
)
def test_wrong_arguments_are_refused_with_the_usage(runs, wrong, said):
    done = dynamics("believe", runs[0], "--site", "embed", *wrong)
    assert done.returncode == 2
    assert said in done.stderr
    assert "usage: dynamics believe RUN [RUN ...] --site LABEL" in done.stderr
    assert done.stdout == ""


def test_a_site_must_be_named(runs):
    done = dynamics("believe", runs[0])
    assert done.returncode == 2
    assert "site" in done.stderr
