"""Gradient patching, step by step, on aliases hardly trained."""

import re

import pytest

from dynamics.config import (
    AliasConfig,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    PrimaryConfig,
    StudyConfig,
    ToyConfig,
)


@pytest.mark.slow
def test_gradient_patching_step_by_step(fitted, tmp_path, reproduce):
    brief = PhaseConfig(steps=4, warmup=1)
    config = StudyConfig(
        task=AliasConfig(modulus=8, multipliers=(2, 3), train_multipliers=1),
        model=ToyConfig(n_layers=2, n_heads=2, d_model=16, d_head=8, d_mlp=16),
        phases=PhasesConfig(pretrain=brief, x1=brief, x2=brief, batch_size=16),
        patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
    )
    fitted(config, tmp_path / "aliases")
    printed, figures = reproduce("002", tmp_path / "aliases", "--first", 1, "--later", 2)
    assert figures == {
        "signals_by_position", "signals_by_head", "gradients_by_head", "gradients_by_component",
    }  # fmt: skip
    assert "Dt3, accuracy at step 9 -> 11" in printed
    assert (
        len(
            re.findall(
                r"^(?:a new AdamW|the run's own), (?:alias \d|all aliases): no step", printed, flags=re.M
            )
        )
        == 4
    )
    shares = dict(re.findall(r"^  (\S.*?) +([+-]\d+\.\d{4})$", printed, flags=re.M))
    assert float(shares["+ unembedding"]) == pytest.approx(1.0, abs=1e-3)  # all parameters
    both = printed.partition("resid_pre, forward and backward")[2]
    first = re.findall(r"^  resid_pre 0 +(\S+)$", both, flags=re.M)[0]
    assert float(first) == pytest.approx(1.0, abs=1e-3)  # no question has a tag, where the embeddings differ
    assert printed.count("no step at all") == 5
