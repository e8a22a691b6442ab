"""The acronym circuit, letter by letter, on a toy hardly trained and on a small random GPT-2."""

import re

import pytest


@pytest.mark.slow
def test_the_acronym_circuit_letter_by_letter(subject, reproduce, tmp_path):
    listed = tmp_path / "acronyms.txt"
    listed.write_text(
        "The Chief Executive Officer (, CEO\nThe Bank Air Art (, BAA\nThe Data Day East (, DDE\n"
    )
    arguments = ["--acronyms", listed] if "--model" in subject("acronyms") else ["--n", 3]
    printed, figures = reproduce("003", *subject("acronyms"), *arguments, "--readme")
    assert figures == {"residual_stream", "heads"}
    assert [p.name for p in (tmp_path / ".readme").iterdir()] == ["acronyms.png"]
    assert len(re.findall(r"^letter \d: clean -?\d+\.\d\d, all words shuffled", printed, flags=re.M)) == 3
    assert printed.count("n = 3 (unit: example, in this run)") == 3
    top = re.findall(r"^top heads: (.*)$", printed, flags=re.M)
    assert [sorted(line.split(", ")) for line in top] == 3 * [["L0H0", "L0H1", "L1H0", "L1H1"]]
