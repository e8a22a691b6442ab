"""How many sites are called significant where tags say nothing? About 10 minutes on 2 cores.

Null control: trains runs whose tags are drawn at random for each alias in X1, replays the same definitions at
X2 step 10 as the study does, and counts sites with p ≤ .05 by sign flips over runs. It should be about one in
twenty.

    .venv/bin/python scripts/experiments/null_control.py --runs 12 --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import scipy.stats
import torch
import xarray as xr

import dynamics as dy
from dynamics.config import PatchingConfig, PrimaryConfig, ScheduleConfig, StudyConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.into_readme import conclude, stamp

FIRST_SEED = 200
X2_STEP = 10
LEVEL = 0.05


def one_run(seed: int, out: Path) -> xr.Dataset:
    """Effects of every site in one run whose tags say nothing, averaged over its aliases."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    path = out / f"seed-{seed}.h5"
    if path.exists():
        return dy.results.load(path)
    default = StudyConfig(seed=seed)
    config = replace(
        default,
        task=replace(default.task, x1_tags="random"),
        phases=replace(default.phases, x2=replace(default.phases.x2, steps=50)),
        schedule=ScheduleConfig(per_decade=1, dense=0, evaluate_every=1000),
        patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
    )
    run = dy.training.fit(config, out / f"seed-{seed}")
    task = dy.tasks.load(run.config)
    recipe = task.recipe()
    state = dy.steps.reach(recipe, run, config.phases.starts["x2"] + X2_STEP, task.batch)
    chosen = [s for level in ("components", "heads") for s in dy.sites.LEVELS[level](recipe.model)]
    parts = [
        dy.patch_gradients(recipe, at, task.contrasts(), chosen, dy.measures.correct_logit)
        for at in (state.with_fresh_optimizer(), state)
    ]
    found = dy.results.concat(parts, "optimizer", ["fresh", "stored"])
    bare = found.drop_vars([name for name, coord in found.coords.items() if "example" in coord.dims])
    means = bare.mean("example", keep_attrs=True)
    dy.results.save(means, path)
    return means


def table(summary: xr.Dataset, seeds: list[int]) -> str:
    """Share of sites called significant, by level of sites and optimizer state."""
    lines = ["| sites | state | p ≤ .05 | share [95 %, Clopper–Pearson] | q ≤ .05 |", "|---|---|---|---|---|"]
    for level in dict.fromkeys(map(str, summary["level"].values)):
        for state in ("fresh", "stored"):
            chosen = summary.sel(optimizer=state).isel(site=summary["level"].values == level)
            n, found = chosen.sizes["site"], int((chosen["p"].values <= LEVEL).sum())
            bounds = scipy.stats.binomtest(found, n).proportion_ci(method="exact")
            lines.append(
                f"| {level} | {state} | {found} of {n} | {found / n:.3f} [{bounds.low:.3f}, {bounds.high:.3f}] "
                f"| {int((chosen['q'].values <= LEVEL).sum())} |"
            )
    called = summary["p"].values <= LEVEL
    n, found = called.size, int(called.sum())
    bounds = scipy.stats.binomtest(found, n).proportion_ci(method="exact")
    lines.append(f"| all | both | {found} of {n} | {found / n:.3f} [{bounds.low:.3f}, {bounds.high:.3f}] | |")
    lines += [
        "",
        f"{len(seeds)} runs (seeds {seeds[0]}–{seeds[-1]}) whose tags are random in X1; X2 step {X2_STEP}, correct "
        f"logit, the run is the unit. {stamp(__file__)}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument(
        "--runs", type=int, default=12, help="runs to train; fewer than 6 cannot reach p = .05"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/null"))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(argv)
    seeds = list(range(FIRST_SEED, FIRST_SEED + given.runs))
    means = runs.each(one_run, [(seed, given.out) for seed in seeds], given.workers)
    joined = dy.results.concat(means, "seed", seeds)
    conclude(given, "null", table(dy.statistics.summarize(joined), seeds))


if __name__ == "__main__":
    main()
