"""The scripts' own arithmetic, and that they keep the rest of the README as it is."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats

ROOT = Path(__file__).parents[2]


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
    seeds = script("seeds")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{seeds.BEGIN}\nold\n{seeds.END}\nafter\n")
    monkeypatch.setattr(seeds, "README", readme)
    seeds.write_into_readme("new")
    assert readme.read_text() == f"before\n{seeds.BEGIN}\nnew\n{seeds.END}\nafter\n"


@pytest.mark.parametrize("name", ["setup", "study", "test", "../.ci/run"])
def test_shell_scripts_are_executable_and_parse(name):
    path = ROOT / "scripts" / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_continuous_integration_calls_the_readmes_test_command():
    assert "./scripts/test" in (ROOT / ".ci" / "run").read_text()
    assert "./scripts/test" in (ROOT / "README.md").read_text()
