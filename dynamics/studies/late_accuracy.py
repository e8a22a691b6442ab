"""How far a run trusts reliable definitions more: weak and strong internalisation."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from dynamics.config import PhasesConfig

LATE = 0.25
"""Which last part of a phase counts as late."""


def internalisation(metrics: pd.DataFrame, phases: PhasesConfig) -> Mapping[str, float]:
    """Accuracies late in X1 and X2, and the two gaps.

    Args:
        metrics: one row per evaluated step, columns `step` and `SET_accuracy`, as RUN/metrics.csv.
        phases: where X1 and X2 lie.

    Returns:
        `weak`: DtQ1 − DfQ2 on untrained questions, mean over the last quarter of X1 (NaN where every
        question is trained); `strong`: Dt3 − Df4, mean over the last quarter of X2; the four means; and of Dt3 and
        Df4 the `lowest` accuracy in that quarter, with the X2 step it is at, as `Dt3_lowest`, `Dt3_lowest_at`.

    Raises:
        ValueError: nothing was evaluated in the last quarter of a phase.
    """
    starts = phases.starts
    late_x1 = _late(metrics, starts["x1"], starts["x2"])
    late_x2 = _late(metrics, starts["x2"], starts["end"])
    found = {
        name: float(rows[f"{name}_accuracy"].mean()) if f"{name}_accuracy" in rows else float("nan")
        for rows, names in ((late_x1, ("DtQ1", "DfQ2")), (late_x2, ("Dt3", "Df4")))
        for name in names
    }
    lowest = {}
    for name in ("Dt3", "Df4"):
        curve = (
            late_x2[["step", f"{name}_accuracy"]].dropna() if f"{name}_accuracy" in late_x2 else late_x2[:0]
        )
        if len(curve):
            row = curve.iloc[int(curve[f"{name}_accuracy"].to_numpy().argmin())]
            lowest[f"{name}_lowest"] = float(row[f"{name}_accuracy"])
            lowest[f"{name}_lowest_at"] = float(row["step"] - starts["x2"])
    return {"weak": found["DtQ1"] - found["DfQ2"], "strong": found["Dt3"] - found["Df4"], **found, **lowest}


def _late(metrics: pd.DataFrame, start: int, stop: int) -> pd.DataFrame:
    first = stop - LATE * (stop - start)
    rows = metrics[(metrics["step"] >= first) & (metrics["step"] < stop)]
    if rows.empty:
        raise ValueError(
            f"no step of {first:.0f}..{stop - 1} was evaluated; lower schedule.evaluate_every, or join the metrics "
            "of the run that this one was forked from."
        )
    return rows
