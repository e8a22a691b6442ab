"""The benchmark with goals: on a user's plain network verbs and loop agree; the table says what was found."""

from dataclasses import replace

import pytest
import torch

from dynamics.config import AliasConfig, PhaseConfig, PhasesConfig, StudyConfig, ToyConfig
from scripts.benchmarks import patching_speed
from scripts.benchmarks import plain_module as script

CONFIG = StudyConfig(
    task=AliasConfig(modulus=8, multipliers=(2, 3, 4), train_multipliers=2),
    model=ToyConfig(n_heads=2, d_model=16, d_head=8, d_mlp=16),
    phases=PhasesConfig(pretrain=PhaseConfig(20), x1=PhaseConfig(20), x2=PhaseConfig(20)),
    patching=replace(StudyConfig().patching, x2_steps=(0, 10)),
)


@pytest.mark.slow
def test_the_verbs_and_the_loop_agree_on_the_plain_network():
    torch.set_num_threads(1)
    bench = script.plain_bench(CONFIG)
    assert len(list(bench.recipe.model.parameters())) == 38
    for row in script.plain_rows(bench):
        found = patching_speed.compared(bench, row, "plain", repeats=1)
        assert found["agreement"] > 0.9 if row.verb == "attribute_step" else found["agreement"] < 1e-5
        assert found["sites"] == (32 if "neurons" in row.name else 38)


@pytest.mark.slow
def test_a_call_for_one_site_is_timed(monkeypatch):
    monkeypatch.setattr(script, "config_of", lambda size: CONFIG)
    assert script.fixed_ms(1) > 0


def test_ratios_and_goals_are_in_the_table():
    found = [
        {
            "threads": 1,
            "row": "`patch_updates`",
            "ours_ms": 1.0,
            "loop_ms": 9.5,
            "goal": 12,
            "agreement": 2e-7,
        },
        {"threads": 2, "row": "one contrast, one site", "ours_ms": 15.04},
    ]
    text = script.table(found, 5)
    assert "| `patch_updates` | 1 | 9.5x | 12x | 1 of 9.5 | 2e-07 |" in text
    assert "| one contrast, one site | 2 | 15.0 ms | 12 ms | – | – |" in text
    assert "Medians of 5 interleaved repeats" in text
