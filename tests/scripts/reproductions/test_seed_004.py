"""Interchange of a fact, on a toy hardly trained and on a small random GPT-2."""

import numpy as np
import pandas as pd
import pytest

import dynamics as dy
from checkpoints import Trajectory
from dynamics.tasks import words

N_LAYERS = 2


@pytest.mark.slow
def test_interchange_of_a_fact(subject, language_runs, reproduce, tmp_path):
    base, source = "Spain", "Italy"
    if "--model" not in subject("facts"):
        base, source = dy.tasks.load(Trajectory.open(language_runs / "facts").config).subjects[:2]
    named = ["--base", base, "--source", source]
    printed, figures = reproduce("004", *subject("facts"), *named)
    assert figures == {"tiles", "bars"}
    frame = pd.read_csv(tmp_path / "004" / "interchange.csv")
    assert len(frame) == 2 * 2 * N_LAYERS * 5
    assert set(frame["measure"]) == {words.COUNTRIES[base][0], words.COUNTRIES[source][0]}
    assert frame["patched"].between(0, 1).all()
    for country in (base, source):
        assert f"The capital of {country} is\n" in printed
    reach = frame[(frame["component"] == "ln1.normalized") & (frame["layer"] == 0)]
    moved = (reach["patched"] - reach["base"]).abs().groupby(reach["pos"]).max()
    np.testing.assert_array_equal(moved > 0, [False, False, False, True, False])  # the subject alone differs
