"""Attribution patching, cell by cell, on a toy hardly trained and on a small random GPT-2."""

import re

import pytest

FAMILIES = ("residual_stream", "layer_outputs", "head_outputs", "qkv", "patterns")


@pytest.mark.slow
def test_attribution_patching_cell_by_cell(subject, language_runs, reproduce, tmp_path):
    more = ["--facts", language_runs / "facts", "--n", 4, "--nodes", 2, "--readme"]
    printed, figures = reproduce("000", *subject("ioi"), *more)
    assert figures == {
        "attention", "attention_of_one_prompt", "facts_subject", "facts_words",
        *(f"{name}_{what}" for name in FAMILIES for what in ("attribution", "patching", "scatter")),
    }  # fmt: skip
    clean, corrupted = re.findall(r"^(?:clean|corrupted) logit difference ([+-]\S+)", printed, flags=re.M)
    assert float(clean) != float(corrupted)
    gap = re.findall(r"^gap (\S+)", printed, flags=re.M)[0]
    assert float(gap) == pytest.approx(float(clean) - float(corrupted), abs=0.011)
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| ")]
    length = 14 + ("--model" in subject("ioi"))  # BOS
    sizes = [2 * length, 4 * length, 4, 12, 4]
    assert [int(row.split("|")[2]) for row in rows[1:]] == sizes
    assert printed.count("probability  answer") == 4
