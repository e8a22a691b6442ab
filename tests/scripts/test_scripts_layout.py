"""Where scripts stand, what they may import, and that each says what it is for and how long it takes."""

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest

from scripts.shared import into_readme
from tests.scripts.calling import ROOT

SCRIPTS = ROOT / "scripts"
SHELL = ("setup", "study", "test", "docs")
SHARED = (
    "scripts/benchmarks/explaind_there.py",
    "scripts/benchmarks/seed_loop.py",
    "scripts/benchmarks/verb_cases.py",
    "scripts/reproductions/subjects.py",
    "scripts/shared/difference.py",
    "scripts/shared/forks.py",
    "scripts/shared/into_readme.py",
    "scripts/shared/runs.py",
    "scripts/shared/synchronising_calls.py",
)
"""Modules that scripts import and nobody runs."""

DURATION = re.compile(r"(seconds|minutes?|hours?)\b.*\.$")

ROWS = "scripts/benchmarks/torture_rows/"
"""What `torture.py` tries, one theme a module."""

PYTHON = [path.relative_to(ROOT).as_posix() for path in sorted(SCRIPTS.rglob("*.py"))]
RUN = [name for name in PYTHON if name not in SHARED and not name.startswith(ROWS)]


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imported(name: str) -> set[str]:
    """Dotted names that a script imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports from where it stands, which a script cannot"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_at_the_root_stand_the_commands_alone():
    assert {path.name for path in SCRIPTS.iterdir() if path.is_file()} == {*SHELL}
    folders = {path.name for path in SCRIPTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {"benchmarks", "experiments", "reproductions", "examples", "shared"}


@pytest.mark.parametrize("name", PYTHON)
def test_a_script_imports_nothing_but_what_users_may(name):
    ours = {i for i in imported(name) if i.split(".")[0] in ("dynamics", "checkpoints", "scripts")}
    assert not [i for i in ours if any(part.startswith("_") for part in i.split("."))]
    machinery = ("dynamics.engine", "dynamics.patching.", "dynamics.attribution.", "dynamics.trees")
    assert not [i for i in ours if i.startswith(machinery)]


@pytest.mark.parametrize("name", RUN)
def test_a_script_finds_what_it_shares_with_others_wherever_it_is_called_from(name):
    told = "sys.path.insert(0, str(Path(__file__).resolve().parents[2]))"
    before, _, after = (ROOT / name).read_text().partition(told)
    assert "from scripts" not in before
    assert ("from scripts" in after) == bool(after)


@pytest.mark.parametrize("name", [name for name in PYTHON if "/examples/" in name])
def test_an_example_stands_alone_to_be_copied(name):
    assert not [i for i in imported(name) if i.split(".")[0] == "scripts"]


@pytest.mark.parametrize("name", RUN)
def test_the_first_line_of_a_script_says_how_long_it_takes(name):
    first = ast.get_docstring(tree(name)).splitlines()[0]
    assert DURATION.search(first), first


@pytest.mark.parametrize("name", RUN)
def test_a_script_says_how_it_is_called_from_where_it_stands(name, capsys):
    assert f".venv/bin/python {name}" in ast.get_docstring(tree(name))
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    assert f".venv/bin/python {name}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_script_that_imports_others_runs_by_its_path(tmp_path):
    """From any folder, as the package is installed in place."""
    command = [sys.executable, ROOT / "scripts/benchmarks/suite_costs.py", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert "--readme" in done.stdout


def test_every_mark_that_a_script_writes_between_is_in_one_page_once():
    written = "\n".join(page.read_text() for page in into_readme.pages())
    marks = [
        mark for name in RUN for mark in re.findall(r'conclude\(given, "(\w+)"', (ROOT / name).read_text())
    ]
    assert len(marks) > 10
    for mark in marks:
        assert written.count(f"<!-- {mark}: begin -->") == written.count(f"<!-- {mark}: end -->") == 1, mark


def test_every_script_that_is_named_is_there():
    pages = [*ROOT.glob("*.md"), *(ROOT / ".readme").glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    pages += [ROOT / name for name in PYTHON]
    pages += [path for package in ("dynamics", "checkpoints") for path in (ROOT / package).rglob("*.py")]
    named = [name for page in pages for name in re.findall(r"\bscripts/[\w/]+\.py\b", page.read_text())]
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("name", [*SHELL, "../.ci/run"])
def test_shell_scripts_are_executable_and_parse(name):
    path = SCRIPTS / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_continuous_integration_calls_the_readmes_commands_for_tests_and_documentation():
    for command in ("./scripts/test", "./scripts/docs"):
        assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()
        assert command in (ROOT / "README.md").read_text()


def test_the_readme_names_the_folder_that_the_documentation_is_built_into():
    (folder,) = re.findall(r"docs (\S+/html)", (ROOT / "scripts" / "docs").read_text())
    assert f"builds it into `{folder}`" in (ROOT / "README.md").read_text()
