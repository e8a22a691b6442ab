"""Strong and weak internalisation over seeds and a dial. About half an hour on 2 cores for 25 runs.

The dial is how many multipliers train. Each run is trained once to the end of X1; X2 is then forked twice,
with the roles of Dt3 and Df4 as drawn and exchanged, and averaged, which cancels luck in the split. The table
goes into the README.

    .venv/bin/python scripts/experiments/seeds.py --seeds 0 1 2 3 4 --dial 1 2 3 4 5 --workers 2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import dynamics as dy
from dynamics.config import StudyConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.forks import ROLES, forked, sparse
from scripts.shared.into_readme import conclude, interval, stamp


def one_seed(seed: int, train_multipliers: int, out: Path) -> dict[str, float]:
    """One seed at one setting of the dial: the two forks' internalisation, averaged."""
    default = StudyConfig(seed=seed)
    config = sparse(replace(default, task=replace(default.task, train_multipliers=train_multipliers)))
    folder, x2 = out / f"train-{train_multipliers}-seed-{seed}", config.phases.starts["x2"]
    forked(config, folder)
    logged = {role: pd.read_csv(folder / role / "metrics.csv") for role in ROLES}
    x1 = logged["drawn"][logged["drawn"]["step"] < x2]
    forks = [
        dy.studies.internalisation(pd.concat([x1, rows[rows["step"] >= x2]]), config.phases)
        for rows in logged.values()
    ]
    return {
        "train_multipliers": train_multipliers,
        "seed": seed,
        "identified": dy.tasks.load(config.to_dict()).identified(),
        **{key: float(np.mean([fork[key] for fork in forks])) for key in forks[0]},
        "strong_drawn": forks[0]["strong"],
        "strong_exchanged": forks[1]["strong"],
    }


def table(results: pd.DataFrame) -> str:
    """One row per setting of the dial: means over seeds with 95 % t intervals, and every seed's gap."""
    lines = [
        "| multipliers trained, of 6 | aliases identified | Dt3 | Df4 | strong: Dt3 − Df4 | per seed | "
        "weak: DtQ1 − DfQ2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for dial, rows in results.groupby("train_multipliers"):
        per_seed = " ".join(f"{gap:+.2f}" for gap in rows.sort_values("seed")["strong"])
        lines.append(
            f"| {dial} | {rows['identified'].mean():.0%} | {rows['Dt3'].mean():.2f} | {rows['Df4'].mean():.2f} | "
            f"{interval(rows['strong'])} | {per_seed} | {interval(rows['weak'])} |"
        )
    seeds = ", ".join(str(seed) for seed in sorted(results["seed"].unique()))
    lines.append("")
    lines.append(
        f"Seeds {seeds}, each the mean of two forks of X2; mean [95 % t interval over seeds]; accuracies are means "
        f"over the last quarter of the phase. {stamp(__file__)}"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--dial", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="multipliers that train")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(argv)
    jobs = [(seed, dial, given.out) for dial in given.dial for seed in given.seeds]
    rows = runs.each(one_seed, jobs, given.workers)
    results = pd.DataFrame(rows).sort_values(["train_multipliers", "seed"], ignore_index=True)
    results.to_csv(given.out / "summary.csv", index=False)
    conclude(given, "seeds", table(results))


if __name__ == "__main__":
    main()
