"""Strong and weak internalisation over seeds and a dial. About half an hour on 2 cores for 25 runs.

The dial is how many multipliers train. Each run is trained once to the end of X1; X2 is then forked twice,
with the roles of Dt3 and Df4 as drawn and exchanged, and averaged, which cancels luck in the split. The table
goes into the README.

    .venv/bin/python scripts/experiments/seeds.py --seeds 0 1 2 3 4 --dial 1 2 3 4 5 --workers 2
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import dynamics as dy
from dynamics.config import PatchingConfig, PrimaryConfig, ScheduleConfig, StudyConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.into_readme import conclude, interval, stamp


def forked(seed: int, train_multipliers: int, out: Path) -> dict[str, float]:
    """One seed at one setting of the dial: the two forks' internalisation, averaged."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    default = StudyConfig(seed=seed)
    drawn = replace(
        default,
        task=replace(default.task, train_multipliers=train_multipliers),
        schedule=ScheduleConfig(per_decade=1, dense=0, evaluate_every=default.schedule.evaluate_every),
        patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
    )
    exchanged = replace(drawn, task=replace(drawn.task, x2_roles="exchanged"))
    folder = out / f"train-{train_multipliers}-seed-{seed}"
    run = dy.training.fit(drawn, folder / "drawn")
    start = run.at(drawn.phases.starts["x2"])
    dy.training.fit(exchanged, folder / "exchanged", start=start)
    x1 = pd.read_csv(folder / "drawn" / "metrics.csv")
    x1 = x1[x1["step"] < start.step]
    forks = [
        dy.studies.internalisation(pd.concat([x1, x2[x2["step"] >= start.step]]), config.phases)
        for config in (drawn, exchanged)
        for x2 in [pd.read_csv(folder / config.task.x2_roles / "metrics.csv")]
    ]
    task = dy.tasks.load(drawn.to_dict())
    return {
        "train_multipliers": train_multipliers,
        "seed": seed,
        "identified": task.identified(),
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
    rows = runs.each(forked, jobs, given.workers)
    results = pd.DataFrame(rows).sort_values(["train_multipliers", "seed"], ignore_index=True)
    results.to_csv(given.out / "summary.csv", index=False)
    conclude(given, "seeds", table(results))


if __name__ == "__main__":
    main()
