"""Which sentences about the default study hold in other settings? About 20 minutes a setting and seed, on one core.

docs/analyses/truth.md, question 9: questions 1, 2 and 7 once each at modulus 120, with four layers, with sums
instead of products, at batch 32, with Adam without decay, and, to set them beside, in the default. Three seeds
each, both forks, trained into the folder given where they are not there. Signs only: in how many seeds it is so.

    .venv/bin/python scripts/experiments/other_settings.py ../runs-settings --workers 2 --readme
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xarray as xr

from checkpoints import Trajectory
from dynamics.config import StudyConfig
from dynamics.tasks import AliasTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.experiments import forecast, single_step_map, window_floor
from scripts.shared.forks import ROLES, Ask, Found, fill, of_seeds, sparse
from scripts.shared.into_readme import conclude, markdown, stamp
from scripts.shared.runs import parser

SEEDS = (424, 425, 426)
AFTER = (10, 20, 50)
"""Steps of the windows."""

DEFAULT = StudyConfig()
SETTINGS = {
    "default": DEFAULT,
    "modulus 120": replace(DEFAULT, task=replace(DEFAULT.task, modulus=120)),
    "four layers": replace(DEFAULT, model=replace(DEFAULT.model, n_layers=4)),
    "sums": replace(DEFAULT, task=replace(DEFAULT.task, operation="sum")),
    "batch 32": replace(DEFAULT, phases=replace(DEFAULT.phases, batch_size=32)),
    "no decay": replace(DEFAULT, phases=replace(DEFAULT.phases, weight_decay=0.0)),
}
Truths = Mapping[str, str]
"""By sentence, in how many seeds it is so."""


def map_holds(found: Found) -> Truths:
    """Question 1: which components' recovery is above 0: the sum of forks' effects over that of whole exchanges.

    A mean of ratios would be that of a fork with next to nothing to recover.
    """
    at = {"step": single_step_map.PRIMARY, "optimizer": "fresh"}
    effects = {
        s: [f.assign(recovery=f["recovery"] * f["whole"]) for f in forks] for s, forks in found.items()
    }
    summed = single_step_map.by_seed(effects).sel(at)
    recovery = summed["recovery"] / summed["whole"]
    words = f"recovery above 0 at step {single_step_map.PRIMARY}, fresh"
    return {
        f"{site}: {words}": _counted(recovery.sel(site=site).values > 0) for site in recovery["site"].values
    }


def windows(task: AliasTask, run: Trajectory) -> xr.Dataset:
    """Question 2's, of fewer steps."""
    return window_floor.floors(task, run, AFTER)


def window_holds(found: Found) -> Truths:
    """Question 2: which components exceed both floors, by length of the window."""
    above = window_floor.told(found)
    words = f"told from noise and placebos after {', '.join(map(str, AFTER))} steps"
    return {
        f"{site}: {words}": _counted(*above.sel(site=site).transpose("step", "seed").values)
        for site in above["site"].values
    }


def forecast_holds(found: Found) -> Truths:
    """Question 7: whether a forecast fitted to the other seeds is above chance, and above the accuracy then.

    Of seeds with aliases of both fates; nothing, where all others' aliases share one.
    """
    rows = forecast.frame(found)
    if any(len({*forecast.internalised(rows[rows["seed"] != seed])}) < 2 for seed in found):
        return {}
    known, alone = (forecast.scored(rows, None, kinds) for kinds in (list(forecast.KINDS), None))
    told = ~np.isnan(known)
    return {
        "forecast: AUROC above .5": _counted(known[told] > 0.5),
        "forecast: AUROC above that of the accuracy at that step": _counted(known[told] > alone[told]),
    }


def _counted(*so: npt.NDArray[np.bool_]) -> str:
    return f"{', '.join(str(seeds.sum()) for seeds in so)} of {len(so[0])}"


SENTENCES: Mapping[str, tuple[Ask, Callable[[Found], Truths]]] = {
    "single-step-map": (single_step_map.recovered, map_holds),
    "window-floor": (windows, window_holds),
    "forecast": (forecast.known, forecast_holds),
}


def table(truths: Mapping[str, Truths]) -> list[str]:
    """Lines: by sentence and setting, in how many seeds it is so; a dash where it is about nothing there."""
    sentences = dict.fromkeys(sentence for of in truths.values() for sentence in of)
    rows = [[sentence, *(of.get(sentence, "–") for of in truths.values())] for sentence in sentences]
    return markdown(["in how many seeds", *truths], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, ask, and say where which sentence holds."""
    made = parser(__doc__)
    made.add_argument("runs", type=Path, help="where runs are, or will be: a folder for each setting")
    made.add_argument("--out", type=Path, default=Path("runs/other-settings"), help="where results are kept")
    made.add_argument("--workers", type=int, default=1, help="processes")
    given = made.parse_args(arguments)
    folders = {name: name.replace(" ", "-") for name in SETTINGS}
    configs = {
        given.runs / folder / f"seed-{seed}": sparse(replace(SETTINGS[name], seed=seed))
        for name, folder in folders.items()
        for seed in SEEDS
    }
    fill(configs, given.workers)
    truths: dict[str, dict[str, str]] = {}
    for name, folder in folders.items():
        own = argparse.Namespace(
            runs=given.runs / folder, out=given.out / folder, workers=given.workers, roles=ROLES
        )
        truths[name] = {}
        for question, (ask, holds) in SENTENCES.items():
            truths[name] |= holds(of_seeds(ask, own, SEEDS, question))
    text = [
        *table(truths),
        "",
        f"In how many of the seeds {', '.join(map(str, SEEDS))}, each the mean of its two forks, a sentence is so; "
        f"nothing is claimed beyond signs. {stamp(__file__)}",
    ]
    conclude(given, "settings", "\n".join(text))


if __name__ == "__main__":
    main()
