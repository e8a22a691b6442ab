"""`dynamics report`: from folders of runs to one file."""

import pytest

from tests.cli.calling import dynamics, succeed
from tests.zoo import reported_runs


@pytest.fixture
def own(made_once):
    return made_once("reported-own", reported_runs.make_own)


def test_a_run_becomes_one_file(own, tmp_path):
    out = tmp_path / "report.html"
    said = succeed("report", own, "-o", out)
    assert said.startswith(f"{out}: 0.")
    assert "encoder" in out.read_text()


def test_results_beside_a_run_are_on_the_page(own, tmp_path):
    made = reported_runs.make_own(tmp_path / "other")
    succeed("report", own, "-o", tmp_path / "report.html", "--results", made / "results" / "mine.h5")
    assert (tmp_path / "report.html").read_text().count('"kind":"map"') == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["-o", "report.pdf"],
            "CommandError: -o report.pdf: a report is one HTML file; expected report.html.",
        ),
        (
            ["-o", "x.html", "--results", "nowhere"],
            "FileNotFoundError: there is no file or folder of results",
        ),
    ],
)
def test_what_cannot_be_made_is_said_in_a_line(own, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = dynamics("report", own, *words)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert list(tmp_path.iterdir()) == []
