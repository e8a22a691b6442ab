"""The scripts' own arithmetic, and that they keep the rest of the README as it is."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # where they import from each other


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_seeds_holds_the_mean_over_seeds_with_its_interval():
    seeds = script("seeds")
    gaps = [0.1, 0.3, 0.2]
    rows = [
        {
            "train_multipliers": 4, "seed": i, "identified": 0.5, "weak": 0.1 * i, "strong": gap,
            "DtQ1": 0.9, "DfQ2": 0.8, "Dt3": 0.5, "Df4": 0.25,
        }
        for i, gap in enumerate(gaps)
    ]  # fmt: skip
    line = next(line for line in seeds.table(pd.DataFrame(rows)).splitlines() if line.startswith("| 4 |"))
    interval = scipy.stats.ttest_1samp(gaps, 0).confidence_interval()
    assert f"+0.20 [{interval.low:+.2f}, {interval.high:+.2f}]" in line
    assert "+0.10 +0.30 +0.20" in line
    assert "| 50% | 0.50 | 0.25 |" in line


def test_the_readme_is_replaced_between_its_marks_alone(tmp_path, monkeypatch):
    into_readme = script("into_readme")
    readme = tmp_path / "README.md"
    marks = "<!-- seeds: begin -->\n{}\n<!-- seeds: end -->\n"
    readme.write_text(f"before\n{marks.format('old')}after\n<!-- loop: begin -->\n<!-- loop: end -->\n")
    monkeypatch.setattr(into_readme, "README", readme)
    into_readme.write("seeds", "new")
    assert (
        readme.read_text()
        == f"before\n{marks.format('new')}after\n<!-- loop: begin -->\n<!-- loop: end -->\n"
    )


def test_every_mark_that_a_script_writes_between_is_in_the_readme_once():
    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "scripts").glob("*.py")):
        for name in re.findall(r'write\("(\w+)", text\)', path.read_text()):
            assert readme.count(f"<!-- {name}: begin -->") == readme.count(f"<!-- {name}: end -->") == 1, path


@pytest.mark.parametrize("name", ["setup", "study", "test", "../.ci/run"])
def test_shell_scripts_are_executable_and_parse(name):
    path = ROOT / "scripts" / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_continuous_integration_calls_the_readmes_test_command():
    assert "./scripts/test" in (ROOT / ".ci" / "run").read_text()
    assert "./scripts/test" in (ROOT / "README.md").read_text()
