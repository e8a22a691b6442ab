"""How many sites are called significant where tags say nothing? About 3 minutes a run, on one core; 24 of them.

Null control; docs/analyses/truth.md, question 5. Trains runs whose tags are drawn at random for each alias in X1,
replays definitions at X2 step 10 as the study does, and counts sites with p ≤ .05 by sign flips over runs. It
should be about one in twenty. The unit is the run: its sites move together, so a run's tags are exchanged at all of
its sites at once, and a share's interval comes from how far two halves of the runs differ.

    .venv/bin/python scripts/experiments/null_control.py --workers 2 --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.stats
import torch
import xarray as xr

import dynamics as dy
from dynamics.config import StudyConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.forks import sparse
from scripts.shared.into_readme import conclude, interval, markdown, stamp
from scripts.shared.runs import each, parser, stored

SEEDS = range(500, 524)
X2_STEP = 10
LEVEL = 0.05
MINUTES = 3.0
"""What a run takes on one core."""
N_EXCHANGES = 4999
N_HALVES = 100

Array = npt.NDArray[np.float64]


def one_run(config: StudyConfig, out: Path) -> xr.Dataset:
    """Effects of every site in one run whose tags say nothing, averaged over its aliases, in both directions."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return stored(out / f"seed-{config.seed}.h5", partial(_effects, config, out / f"seed-{config.seed}"))


def _effects(config: StudyConfig, folder: Path) -> xr.Dataset:
    run = dy.training.fit(config, folder)
    task = dy.tasks.load(run.config)
    recipe = task.recipe()
    state = dy.steps.reach(recipe, run, config.phases.starts["x2"] + X2_STEP, task.batch)
    chosen = [s for level in ("components", "heads") for s in dy.sites.LEVELS[level](recipe.model)]
    parts = [
        dy.both_directions(
            dy.patch_gradients, recipe, at, task.contrasts(), chosen, dy.measures.correct_logit
        )
        for at in (state.with_fresh_optimizer(), state)
    ]
    found = dy.results.concat(parts, "optimizer", ["fresh", "stored"])
    bare = found.drop_vars([name for name, coord in found.coords.items() if "example" in coord.dims])
    return bare.mean("example", keep_attrs=True)


def without_meaning(seed: int) -> StudyConfig:
    """The default study with random tags in X1, and as much of X2 as is looked at."""
    default = sparse(StudyConfig(seed=seed))
    phases = default.phases.shortened("x2", X2_STEP + 1)
    return replace(default, task=replace(default.task, x1_tags="random"), phases=phases)


# --- what it comes to -------------------------------------------------------------------------------------


def exchanged_p(effects: Array) -> Array:
    """p of each site by sign flips over runs, as found and with whole runs' tags exchanged: [exchange, site].

    The first row is as found. Every row is held against the same exchanges, so rows are p values that the same test
    would give in runs as likely, with the same dependence between sites.

    Args:
        effects: [run, site].

    Source: Westfall & Young 1993, one set of resamples for all tests.
    """
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (N_EXCHANGES + 1, len(effects)))
    signs[0] = 1
    sums = np.abs(signs @ effects)
    ranks: Array = scipy.stats.rankdata(-sums.round(12), axis=0, method="max") / len(signs)
    return ranks


def family_p(effects: Array) -> float:
    """How often exchanging whole runs' tags has as many sites called."""
    called = (exchanged_p(effects) <= LEVEL).sum(1)
    return float((called >= called[0]).mean())


def share_in_halves(effects: Array) -> tuple[float, float, float]:
    """The share of sites called by half of the runs, and its 95 % interval: [run, site] -> mean, low, high.

    The mean over random halvings, its spread that of two halves, which have no run in common, so sites may depend
    on each other as they like. It over-covers: .97 and more, of 24 runs. Redrawing runs with replacement would not
    do: a redrawn study is about the effects that were found, and calls one site in six where there are none.
    """
    draws, n = np.random.default_rng(1), len(effects) // 2
    halves = np.array(
        [
            [(exchanged_p(effects[half])[0] <= LEVEL).mean() for half in (order[:n], order[n : 2 * n])]
            for order in (draws.permutation(len(effects)) for _ in range(N_HALVES))
        ]
    )
    mean, spread = halves.mean(), np.sqrt((np.diff(halves, axis=1) ** 2).mean()) / 2
    half = spread * scipy.stats.t.ppf(0.975, len(effects) - 1)
    return float(mean), max(0.0, float(mean - half)), min(1.0, float(mean + half))


def table(effect: xr.DataArray) -> list[str]:
    """Lines: sites called significant, by level and optimizer state, of `effect` [seed, optimizer, site]."""
    cells = {
        (level, state): effect.sel(optimizer=state).isel(site=effect["level"].values == level).values
        for level in dict.fromkeys(map(str, effect["level"].values))
        for state in ("fresh", "stored")
    }
    cells["all", "both"] = np.hstack(list(cells.values()))
    rows = []
    for words, values in cells.items():
        n, called = values.shape[1], int((exchanged_p(values)[0] <= LEVEL).sum())
        share = "{:.3f} [{:.3f}, {:.3f}]".format(*share_in_halves(values))
        rows.append([*words, f"{called} of {n}", share, f"{family_p(values):.3f}"])
    return markdown(
        ["sites", "state", f"p ≤ {LEVEL}", "share in half of the runs [95 %]", "p of as many"], rows
    )


def mixed(both: xr.Dataset) -> list[str]:
    """Lines: by component what a step with gradients of both tags does beyond steps with one, and the tags' gap."""
    states = [both.sel(optimizer=state) for state in ("fresh", "stored")]
    rows = [
        [site, *(interval(of["mixing"].sel(site=site).values) for of in states)]
        for site in map(str, both["site"].values[both["level"].values == "components"])
    ]
    rows.append(["reliable − unreliable", *(interval((of["source"] - of["base"]).values) for of in states)])
    return markdown(["component", "fresh", "stored"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Say what it will take, train and ask, and say what was found."""
    made = parser(__doc__)
    made.add_argument("--out", type=Path, default=Path("runs/null"), help="where runs and results are kept")
    made.add_argument("--workers", type=int, default=1, help="processes")
    given = made.parse_args(arguments)
    missing = sum(not (given.out / f"seed-{seed}.h5").exists() for seed in SEEDS)
    print(
        f"{missing} of {len(SEEDS)} runs to train and ask: {missing * MINUTES / given.workers:.0f} minutes."
    )
    found = each(one_run, [(without_meaning(seed), given.out) for seed in SEEDS], given.workers)
    joined = dy.results.concat(found, "seed", list(SEEDS))
    one, both = joined.sel(direction="sufficiency", drop=True), dy.statistics.antisymmetric(joined)
    by_run = [of["effect"].transpose("seed", "optimizer", "site") for of in (one, both)]
    text = [
        *("One direction, as the study asks:", "", *table(by_run[0]), ""),
        *("Both directions, half of their difference:", "", *table(by_run[1]), ""),
        *("What mixing does by itself, half of their sum, in logits:", "", *mixed(both), ""),
        f"{len(SEEDS)} runs (seeds {SEEDS[0]}–{SEEDS[-1]}) whose tags are random in X1; X2 step {X2_STEP}, "
        f"correct logit. The run is the unit: p by sign flips over runs; of as many, by exchanging runs' tags "
        f"at all sites at once. {stamp(__file__)}",
    ]
    conclude(given, "null", "\n".join(text))


if __name__ == "__main__":
    main()
