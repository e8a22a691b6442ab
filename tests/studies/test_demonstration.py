"""The demonstration: it shows an effect, and says where everything is."""

from dataclasses import replace

import pytest

import dynamics as dy
from dynamics.config import PhaseConfig
from dynamics.studies.demonstration import RUN, demonstrate

SHORT = replace(
    RUN,
    phases=replace(RUN.phases, learn=PhaseConfig(6), late=PhaseConfig(4)),
    model=replace(RUN.model, n_layers=1, d_model=16, d_mlp=16),
)


@pytest.mark.slow
def test_a_demonstration_leaves_a_run_a_figure_and_results(tmp_path):
    shown = demonstrate(str(tmp_path / "demo"), SHORT)
    assert shown.figure.read_bytes().startswith(b"\x89PNG")
    effects = dy.results.load(shown.folder / "results" / "demo.h5")
    assert shown.table == dy.statistics.table(dy.statistics.summarize(effects))
    assert demonstrate(shown.folder, SHORT) == shown  # trains nothing anew


@pytest.mark.slow
def test_the_demonstrations_effect_is_clear(tmp_path):
    shown = demonstrate(tmp_path / "demo")
    summary = dy.statistics.summarize(dy.results.load(shown.folder / "results" / "demo.h5"))
    assert float(summary["gap_low"]) > 0
    assert float(summary["recovery_low"].max()) > 0.2
