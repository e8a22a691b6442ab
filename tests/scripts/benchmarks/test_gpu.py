"""The script for a GPU, in small on the CPU: every part is taken, and what fails is said."""

import json

import pytest

from scripts.benchmarks import gpu as script
from tests.scripts.calling import call

pytestmark = pytest.mark.slow


def test_on_the_cpu_every_part_is_taken_and_none_fails(tmp_path):
    said = call(script, "--device", "cpu", "--json", tmp_path / "gpu.json")
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert len(kept["parts"]) == 1 + len(script.VERBS) + 2
    assert "0 failed." in said
    for verb in script.VERBS:
        assert kept["parts"][f"tiny: {verb}"]["seconds_a_site"] > 0
        assert sum(kept["parts"][f"tiny: {verb}"]["waits"].values()) > 0


def test_a_part_that_fails_is_named_and_the_others_are_taken(tmp_path, monkeypatch, capsys):
    def broken():
        raise ValueError("broken")

    monkeypatch.setattr(script, "parts", lambda device: [("one", broken), ("two", dict)])
    with pytest.raises(SystemExit) as stopped:
        script.main(["--device", "cpu", "--json", str(tmp_path / "gpu.json")])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "FAILED one" in said
    assert "ok     two" in said
    assert "one: ValueError: broken" in said
    assert "broken" in json.loads((tmp_path / "gpu.json").read_text())["parts"]["one"]["failed"]


def test_after_its_time_no_part_is_begun(tmp_path):
    failed = script.run("cpu", tmp_path / "gpu.json", seconds=-1)
    assert len(failed) == len(script.parts("cpu"))
    assert all("not begun" in line for line in failed)
