"""The example of comparing checkpoints leaves what it says."""

import pytest

from dynamics import results
from scripts.examples import compare_checkpoints
from tests.scripts.calling import call


@pytest.mark.slow
def test_the_example_of_comparing_leaves_datasets_and_figures(alias_runs, tmp_path):
    said = call(compare_checkpoints, alias_runs[0], "--from", "20", "--to", "30", "--out", "compared")
    assert said.startswith("site, by relative\n")
    assert "accuracy of Dt3: " in said
    out = tmp_path / "compared"
    assert {path.stem for path in out.glob("*.png")} == {"moved", "weights", "alignment", "attribution"}
    pair = results.load(out / "pair" / "weights.h5")
    top = str(pair["site"].values[int(pair["relative"].values.argmax())])
    assert said.splitlines()[1].startswith(f"  {top}: ")
    effects = results.load(out / "steps" / "effects.h5")
    scores = results.load(out / "steps" / "scores.h5")
    assert effects["step"].values.tolist() == scores["step"].values.tolist()[:-1]
