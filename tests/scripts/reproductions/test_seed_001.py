"""A framework of one's own task, on a toy hardly trained and on a small random GPT-2."""

import re

import pytest

N_LAYERS, N_HEADS = 2, 2


@pytest.mark.slow
def test_a_framework_of_ones_own_task(subject, reproduce):
    printed, figures = reproduce("001", *subject("ioi"), "--n", 5)
    assert figures == {f"{c}_{what}" for c in ("order", "subject") for what in ("components", "heads")}
    assert printed.count("n = 5 (unit: example, in this run)") == 2
    sites = re.findall(r"^((?:attn_out|mlp_out) \d|attn\.z L\dH\d) +\S+ +\[", printed, flags=re.M)
    assert len(sites) == 2 * (2 * N_LAYERS + N_LAYERS * N_HEADS)
    for line in re.findall(r"^heads: (.*)$", printed, flags=re.M):
        assert sorted(line.split(", ")) == ["L0H0", "L0H1", "L1H0", "L1H1"]
