"""What users install: the wheel's contents, the editable install; and a folder of theirs called checkpoints."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_a_folder_called_checkpoints_in_the_working_directory_is_named_with_what_to_do(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "__init__.py").write_text("raise SystemExit('it was run')")
    done = python("-c", "import dynamics", cwd=tmp_path)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert str(tmp_path / "checkpoints") in done.stderr
    assert "rename it, or run from elsewhere" in done.stderr


@pytest.mark.slow
def test_a_folder_of_checkpoints_that_is_no_package_does_no_harm(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    done = python("-c", "import dynamics; print(dynamics.Checkpoint.__name__)", cwd=tmp_path)
    assert done.stdout == "Checkpoint\n", done.stderr


@pytest.mark.slow
def test_wheel_and_sdist_build_and_hold_what_they_should(tmp_path):
    done = python("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = {
        name
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
        if name.startswith(("dynamics/", "checkpoints/"))
    }
    assert {name for name in held if ".dist-info/" not in name} == tracked
    assert {"dynamics/py.typed", "checkpoints/py.typed", "dynamics/plots/dynamics.mplstyle"} <= tracked
    metadata = zipfile.ZipFile(wheel).read(next(n for n in held if n.endswith("/METADATA"))).decode()
    for line in ("License-Expression: MIT", "Provides-Extra: docs"):
        assert line in metadata
    listed = subprocess.check_output(["tar", "tzf", sdist], text=True)
    for name in (
        "docs/index.md",
        "CITATION.cff",
        "CHANGELOG.md",
        ".readme/recovery.png",
        "tests/conftest.py",
    ):
        assert f"/{name}\n" in listed
    assert "/_build/" not in listed


@pytest.mark.slow
def test_an_editable_install_offers_the_two_packages_alone(tmp_path):
    code = "from hatchling.build import build_editable; import sys; print(build_editable(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": ""}
    made = subprocess.check_output(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, text=True
    )
    wheel = zipfile.ZipFile(tmp_path / made.split()[-1])
    wheel.extractall(tmp_path / "site")
    text = "".join(p.read_text() for p in (tmp_path / "site").glob("*") if p.suffix in (".pth", ".py"))
    assert f"{ROOT}\n" not in text
    assert "'dynamics'" in text
    assert "'checkpoints'" in text
    assert "tests" not in text.replace(str(ROOT), "")
    assert "scripts" not in text.replace(str(ROOT), "")


def test_the_citation_names_the_version_that_is_built():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
