"""Is the difference gone where it was localised, and only there? About 5 minutes a run.

From the first steps of X2 a tenth of the matrices is chosen, those whose gradients' tags move Dt3 − Df4 most
together (`patch_window` over recorded batches). X2 is then trained again from the same checkpoint with the
tag's gradient difference erased in them, everywhere, or in random matrices with as many parameters and as
large a difference.

    .venv/bin/python scripts/experiments/closing_the_loop.py runs/seeds-fresh/train-5-seed-*/drawn --readme
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
import pandas as pd
import torch
from tqdm import tqdm

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics.recipe import Recipe
from dynamics.sites import Site

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import conclude, interval, markdown, stamp
from scripts.shared.runs import each, parser_of_runs, run_key

SHARE = 0.1
CANDIDATES = 16
"""Matrices, those that move most alone, among which a set is chosen together."""
N_RANDOM = 2
MEASURES = {"accuracy": dy.measures.accuracy, "correct_logit": dy.measures.correct_logit}


def squared(tensors: dict[str, torch.Tensor], site: Site) -> float:
    """Σ x² over what a site covers."""
    return sum(float(tensors[name][index].double().square().sum()) for name, index in site.covers.items())


def moved(
    recipe: Recipe, start: Checkpoint, training: list[dy.Contrast], sites: list[Site]
) -> npt.NDArray[np.float64]:
    """How far Dt3 − Df4 moves when a window trains a site on the other tags, for each site."""
    found = dy.patch_window(recipe, start, training, sites, dy.measures.correct_logit).squeeze("step")
    effect, reliable = found["effect"].values, found["set"].values == "Dt3"
    return np.abs(effect[reliable].mean(0) - effect[~reliable].mean(0))


def chosen_and_random(
    recipe: Recipe, start: Checkpoint, task: dy.tasks.AliasTask, seed: int, look: int, choose: str
) -> tuple[list[Site], list[list[Site]], list[tuple[float, float]]]:
    """The matrices that move Dt3 − Df4 most, random sets of others, and how well these match in size and ‖Δ‖."""
    matrices = dy.sites.matrices(recipe.model)
    base = [task.batch(start.step + n) for n in range(look)]
    source = [task.retag(batch) for batch in base]
    training = [replace(c, base=base, source=source) for c in task.contrasts()]
    moves = partial(moved, recipe, start, training)
    n_top = round(SHARE * len(matrices))
    order = np.argsort(-moves(matrices))
    if choose == "together":
        top, candidates = [int(order[0])], order[1:CANDIDATES].tolist()
        while len(top) < n_top:
            sets = [dy.sites.union(recipe.model, [matrices[j] for j in (*top, i)]) for i in candidates]
            top.append(candidates.pop(int(np.argmax(moves(sets)))))
        order = np.array([*top, *(i for i in order if i not in top)])
    ends = [
        dy.steps.advance(recipe, start, start.step + look, lambda step, b=b: b[step - start.step]).parameters
        for b in (base, source)
    ]
    delta = {name: ends[1][name] - ends[0][name] for name in ends[0]}
    ones = {name: torch.ones_like(p) for name, p in delta.items()}
    sizes = np.array([[squared(tensors, site) for tensors in (ones, delta)] for site in matrices])
    wanted = sizes[order[:n_top]].sum(0)
    draws = np.random.default_rng(seed)
    rest = order[n_top:]
    tries = [draws.choice(rest, size=int(draws.integers(1, len(rest))), replace=False) for _ in range(20_000)]
    ratios = np.array([sizes[t].sum(0) / wanted for t in tries])
    best = np.argsort(np.abs(np.log(ratios)).sum(1))[:N_RANDOM]
    random_sets = [[matrices[i] for i in tries[b]] for b in best]
    return (
        [matrices[i] for i in order[:n_top]],
        random_sets,
        [(r[0], float(np.sqrt(r[1]))) for r in ratios[best]],
    )


def trained(recipe: Recipe, start: Checkpoint, task: dy.tasks.AliasTask, n_steps: int) -> dict[str, float]:
    """Dt3 − Df4 over the last quarter of n_steps of X2, each measure's mean over five moments."""
    moments = np.linspace(0.75 * n_steps, n_steps, 5).round().astype(int) + start.step
    state, values = start, []
    for moment in moments:
        state = dy.steps.advance(recipe, state, int(moment), task.batch)
        values.append([gap(recipe, state, task, measure) for measure in MEASURES.values()])
    return dict(zip(MEASURES, np.mean(values, axis=0), strict=True))


def gap(recipe: Recipe, state: Checkpoint, task: dy.tasks.AliasTask, measure: dy.measures.Measure) -> float:
    """Mean of a measure over the questions of Dt3 less that over Df4."""
    state.restore(recipe.model)
    recipe.model.eval()
    with torch.no_grad():
        dt3, df4 = (float(measure(recipe.model, task.evaluation[name]).mean()) for name in ("Dt3", "Df4"))
    recipe.model.train()
    return dt3 - df4


def one_run(folder: Path, n_steps: int, look: int, choose: str, out: Path) -> pd.DataFrame:
    """All worlds of one run; kept as CSV under `out`."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    run = Trajectory.open(folder)
    seed = int(run.config["seed"])
    path = out / f"{run_key(run)}-{n_steps}-{look}-{choose}.csv"
    if path.exists():
        return pd.read_csv(path)
    task = dy.tasks.load(run.config)
    recipe = task.recipe()
    start = run.at(task.config.phases.starts["x2"])
    top, random_sets, ratios = chosen_and_random(recipe, start, task, seed, look, choose)
    everything = [dy.sites.union(recipe.model, dy.sites.parameters(recipe.model), "everything")]
    worlds = {"nowhere": [], "everywhere": everything, "chosen": top}
    worlds |= {f"random {i}": sites for i, sites in enumerate(random_sets)}
    rows = []
    for name, sites in tqdm(worlds.items(), desc=str(folder), unit="world"):
        world = dy.tasks.tag_blind(recipe, task, sites) if sites else recipe
        size, difference = ratios[int(name[-1])] if name.startswith("random") else (np.nan, np.nan)
        rows.append(
            {
                "seed": seed,
                "erased": name,
                "matrices": ", ".join(site.label for site in sites),
                "parameters of the chosen": size,
                "difference of the chosen": difference,
                **trained(world, start, task, n_steps),
            }
        )
    found = pd.DataFrame(rows)
    out.mkdir(parents=True, exist_ok=True)
    found.to_csv(path, index=False)
    return found


def table(found: pd.DataFrame, n_steps: int, look: int, choose: str) -> str:
    """Dt3 − Df4 in each world, and how much of what erasing everywhere takes away is gone."""
    kinds = found.assign(erased=found["erased"].str.replace(r" \d", "", regex=True))
    per_seed = kinds.groupby(["erased", "seed"])[list(MEASURES)].mean().unstack("seed")
    head = ["tag's difference erased in", "Dt3 − Df4, accuracy", "gone of it", "correct logit", "gone of it"]
    rows = []
    for name in ("nowhere", "everywhere", "chosen", "random"):
        cells = []
        for measure in ("accuracy", "correct_logit"):
            values = per_seed.loc[name, measure].to_numpy()
            full = per_seed.loc["nowhere", measure].to_numpy()
            gone = dy.statistics.recovery(
                full - values, full - per_seed.loc["everywhere", measure].to_numpy()
            )
            shown = "–" if np.isnan(gone.estimate) else "{:.0%} [{:.0%}, {:.0%}]".format(*map(float, gone))
            cells += [interval(values), shown]
        names = {"chosen": f"the chosen {SHARE:.0%} of matrices", "random": "random matrices, matched"}
        rows.append([names.get(name, name), *cells])
    often = found.loc[found["erased"] == "chosen", "matrices"].str.split(", ").explode().value_counts()
    matched = found[found["erased"].str.startswith("random")]
    most = ", ".join(f"{label} ({n})" for label, n in often.head(6).items())
    spans = [
        f"{matched[column].min():.2f}–{matched[column].max():.2f}"
        for column in ("parameters of the chosen", "difference of the chosen")
    ]
    seeds = ", ".join(map(str, sorted(found["seed"].unique())))
    lines = [
        *markdown(head, rows),
        "",
        f"Seeds {seeds}; chosen {choose} by the first {look} of {n_steps} steps of X2; means over the last "
        f"quarter; gone = ratio of means, Fieller's 95 % interval over seeds. Chosen most often: {most}. Random "
        f"sets have {spans[0]} times the chosen parameters and {spans[1]} times their ‖Δ‖. {stamp(__file__)}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of_runs(__doc__, "loop")
    parser.add_argument("--steps", type=int, default=500, help="steps of X2 to train again")
    parser.add_argument("--look", type=int, default=10, help="first steps of X2 that the choice may look at")
    parser.add_argument(
        "--choose",
        choices=("alone", "together"),
        default="together",
        help="by what each matrix moves alone, or one after another by what it moves together with those before",
    )
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(argv)
    settings = (given.steps, given.look, given.choose)
    parts = each(one_run, [(folder, *settings, given.out) for folder in given.runs], given.workers)
    conclude(given, "loop", table(pd.concat(parts), *settings))


if __name__ == "__main__":
    main()
