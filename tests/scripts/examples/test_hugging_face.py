"""The worked example on a Hugging Face model, in miniature."""

import re

import pytest

from scripts.examples import hugging_face
from tests.scripts.calling import call


@pytest.mark.slow
def test_the_worked_example_on_hugging_face_prints_its_four_lines(tmp_path):
    lines = call(hugging_face, "--layers", "1", "--width", "64").splitlines()
    peaks = [line for line in lines if re.search(r"peak \d+\.\d GB$", line)]
    assert [line.split(":")[0].strip() for line in peaks] == [
        "model loaded",
        "patch_signals, one layer's MLP output",
        "patch_gradients, 4 heads",
        "patch_updates, 4 heads",
    ]
    effects = [line for line in lines if re.fullmatch(r"  \S.*: [+-]\d\.\d\de[+-]\d\d", line)]
    assert len(effects) == 3
    assert len(lines) == 1 + len(peaks) + len(effects)
    assert re.fullmatch(r"\d+ M parameters, \d\.\d\d GB", lines[0])
    assert not any(float(line.rpartition(": ")[2]) == 0.0 for line in effects)
    assert list(tmp_path.iterdir()) == []
