"""What a study says of its numbers."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from dynamics import results, statistics, tasks
from dynamics.config import PatchingConfig, PhaseConfig, PhasesConfig, PrimaryConfig, StudyConfig
from dynamics.studies import internalisation
from dynamics.studies.aliases import primary
from dynamics.studies.findings import findings, limits

PHASES = PhasesConfig(pretrain=PhaseConfig(4), x1=PhaseConfig(8), x2=PhaseConfig(12))


def metrics(**columns: list[float]) -> pd.DataFrame:
    """One row for every step of the run above; a column not given is zero."""
    names = ("DtQ1", "DfQ2", "Dt3", "Df4")
    table = {"step": range(24)} | {f"{n}_accuracy": columns.get(n, [0.0] * 24) for n in names}
    return pd.DataFrame(table)


def test_internalisation_is_the_gap_over_the_last_quarter_of_each_phase():
    early = [1.0] * 24  # What came before the last quarter must not count.
    reliable = [*early[:10], 0.9, 0.7, *early[12:]]
    strong = [*early[:21], 0.6, 0.5, 0.4]
    found = internalisation(metrics(DtQ1=reliable, Dt3=strong, Df4=[0.2] * 24), PHASES)
    assert found["weak"] == pytest.approx(0.8)
    assert found["strong"] == pytest.approx(0.5 - 0.2)
    assert found["Dt3"] == pytest.approx(0.5)


def test_the_first_step_after_a_phase_is_not_the_phases_own():
    found = internalisation(metrics(DtQ1=[0.0] * 12 + [1.0] * 12), PHASES)
    assert found["weak"] == 0.0


def test_where_every_question_is_trained_there_is_no_weak_internalisation_to_measure():
    found = internalisation(metrics().drop(columns=["DtQ1_accuracy", "DfQ2_accuracy"]), PHASES)
    assert np.isnan(found["weak"])
    assert found["strong"] == 0.0


def test_a_run_without_late_evaluations_is_refused():
    with pytest.raises(ValueError, match=r"no step of 21\.\.23 was evaluated"):
        internalisation(metrics().query("step < 21"), PHASES)


CONFIG = StudyConfig(
    phases=PHASES,
    patching=PatchingConfig(
        x2_steps=(0, 3), measures=("correct_logit",), levels=("components",), primary=PrimaryConfig(x2_step=3)
    ),
)


def effects(size: float) -> xr.Dataset:
    """Twelve aliases; site `a` carries the whole gap of `size`, site `b` nothing but noise."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=(12, 2))
    base = np.zeros(12)

    def at(scale: float) -> xr.Dataset:
        source = base + scale * size + noise[:, 0]
        return results.effects(
            patched=np.stack([source, 1e-3 * noise[:, 1]], axis=1)[None],
            references={"base": base[None], "source": source[None], "untouched": base[None]},
            example_coords={"example": [f"alias {i}" for i in range(12)]},
            site_coords={"site": ["a", "b"], "level": ["components"] * 2},
            measure_names=["correct_logit"],
            units=["logit"],
            provenance=results.provenance(),
        )

    by_optimizer = [results.concat([at(s), at(2 * s)], "step", [12, 15]) for s in (0.5, 1.0)]
    return results.concat(by_optimizer, "optimizer", ["stored", "fresh"])


def words(size: float) -> str:
    summary = statistics.summarize(effects(size))
    task = tasks.AliasTask(CONFIG)
    chosen = primary(summary, CONFIG.patching, task)
    accuracy = internalisation(metrics(Dt3=[0.6] * 24, Df4=[0.25] * 24), PHASES)
    return findings(task, accuracy, summary, chosen)


def test_the_primary_analysis_is_the_one_the_config_names():
    summary = statistics.summarize(effects(1.0))
    chosen = primary(summary, CONFIG.patching, tasks.AliasTask(CONFIG))
    assert (chosen["step"].item(), chosen["optimizer"].item()) == (15, "fresh")
    assert chosen["gap"].item() == pytest.approx(2.0, abs=0.1)
    assert chosen["effect"].dims == ("site",)


def test_findings_name_the_site_that_carries_the_gap_and_not_the_other():
    text = words(1.0)
    assert "answered 60% correctly" in text
    assert "+0.35" in text
    assert "is distinguishable from zero" in text
    assert "1 of 2 sites" in text
    assert "being a (+" in text
    assert "recovery 100%" in text
    assert "largest at X2 step 3:" in text
    assert "collapsed" not in text


def test_findings_name_a_collapse_of_an_accuracy_late_in_x2():
    task, steady = tasks.AliasTask(CONFIG), [0.6] * 24
    summary = statistics.summarize(effects(1.0))
    fallen = [*steady[:-2], 0.1, *steady[-1:]]
    accuracy = internalisation(metrics(Dt3=fallen, Df4=[0.25] * 24), PHASES)
    text = findings(task, accuracy, summary, primary(summary, CONFIG.patching, task))
    at = int(metrics()["step"].iloc[-2]) - PHASES.starts["x2"]
    assert f"Accuracy collapsed on the way (Dt3 10% at X2 step {at})" in text


def test_a_gap_that_may_be_zero_is_said_to_be_a_null_result():
    text = words(0.0)
    assert "not distinguishable from zero" in text
    assert "a null result" in text
    assert "recovery" not in text


def test_limits_name_the_primary_analysis_and_the_unit_of_the_claim():
    text = limits(tasks.AliasTask(CONFIG))
    assert "X2 step 3, fresh optimizer state, correct_logit, components" in text
    assert "exploratory" in text
    assert "this run (seed 0)" in text
