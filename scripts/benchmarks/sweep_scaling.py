"""How sweeps scale over cores, and whether they take what was foretold. About 10 minutes on 2 cores.

One sweep of a finished run (gradients exchanged at every site of its config, all held-out aliases, stored and
fresh optimizer) is taken serially and by 1, 2, ... workers, each into an empty folder and with its estimate
made before. The Datasets must be identical. Needs a machine that does nothing else meanwhile.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/benchmarks/sweep_scaling.py --run runs/aliases --workers 0 1 2
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import xarray as xr

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics import sweeps

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.into_readme import conclude, stamp


def asked(run: Trajectory, replays: int) -> sweeps.Plan:
    """The smallest sweep over the first stored steps of X2 that has at least so many replays."""
    config = sweeps.of_config(run).config
    starts, levels = config.phases.starts, config.patching.levels
    stored = [step for step in run.steps if starts["x2"] <= step < starts["end"]]

    def plan(n_steps: int) -> sweeps.Plan:
        return sweeps.plan(
            dy.patch_gradients,
            run,
            stored[:n_steps],
            lambda task, _: task.contrasts(),
            lambda model: [site for level in levels for site in dy.sites.LEVELS[level](model)],
            {name: dy.measures.by_name(name) for name in config.patching.measures},
            {"stored": sweeps.as_stored, "fresh": Checkpoint.with_fresh_optimizer},
        )

    per_step = plan(1).replays
    return plan(min(len(stored), -(-replays // per_step)))


def timed(plan: sweeps.Plan, workers: int) -> tuple[xr.Dataset, dict[str, float]]:
    """One sweep, what it took and what had been foretold."""
    with tempfile.TemporaryDirectory() as folder:
        foretold = sweeps.estimate(plan, folder, workers)
        start = time.perf_counter()
        found = sweeps.run(plan, folder, workers)
        seconds = time.perf_counter() - start
    return found, {
        "workers": workers,
        "replays": plan.replays,
        "seconds": seconds,
        "foretold_seconds": foretold.seconds,
        "megabytes": sweeps.peak_megabytes(),
        "foretold_megabytes": foretold.megabytes,
    }


def table(rows: list[dict[str, float]]) -> str:
    """One line for each number of workers; speed-up over a single worker."""
    single = next((row["seconds"] for row in rows if row["workers"] == 1), float("nan"))
    lines = [
        "| workers | replays | time | ms a replay | speed-up over 1 worker | time / foretold | memory / foretold |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['workers'] or 'none: serial'} | {row['replays']:,} | {sweeps.duration(row['seconds'])} | "
        f"{1e3 * row['seconds'] / row['replays']:.2f} | {single / row['seconds']:.2f} | "
        f"{row['seconds'] / row['foretold_seconds']:.2f} | {row['megabytes'] / row['foretold_megabytes']:.2f} |"
        for row in rows
    ]
    lines += [
        "",
        f"The toy of the default study; starting the workers included; load {os.getloadavg()[0]:.1f} at the end. "
        f"{stamp(__file__)}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/aliases"))
    parser.add_argument("--replays", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path("runs/sweep-scaling.json"))
    given = parser.parse_args(argv)
    plan = asked(Trajectory.open(given.run), given.replays)
    found, rows = [], []
    for workers in given.workers:
        dataset, row = timed(plan, workers)
        found.append(dataset)
        rows.append(row)
        xr.testing.assert_identical(dataset, found[0])
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(rows, indent=1))
    conclude(given, "sweep", table(rows))


if __name__ == "__main__":
    main()
