"""Do methods of localisation find the place where the tag can act? About 2 minutes a planted site and run.

Planted truth: in X2 every definition's gradient outside a planted site is averaged over both tags, so the
tag's difference can be written there alone; three decoys get a tag difference of the same norm, orthogonal to
the measure's gradient. The truth of a site is what exchanging the tags' gradients there through a window of
X2 does to Dt3 − Df4. Each method gives every candidate a score from single definitions; it is held against
the plant and the truth.

    .venv/bin/python scripts/experiments/planted_truth.py runs/seeds-fresh/train-5-seed-*/drawn --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import conclude, stamp
from scripts.shared.runs import each, parser_of_runs, run_key

PLANTS = ("embed", "attn 0", "mlp 0", "attn 1", "L0H0", "L0H2", "L1H1")
N_DECOYS = 3
WARM_UP = 10
"""Steps of the planted X2 before methods look."""
WINDOW = 30
IMPULSE = 10
MEASURE = dy.measures.correct_logit
HOOKS = {"embed": "hook_embed", "attn": "blocks.{layer}.hook_attn_out", "mlp": "blocks.{layer}.hook_mlp_out"}
CHANCE = "chance"


def mean_size(found: xr.DataArray) -> np.ndarray:
    """|mean over aliases| of each site."""
    return np.abs(found.mean("example").values)


# --- the planted world ------------------------------------------------------------------------------------


def covered(tensors: dict[str, Tensor], site: Site) -> Tensor:
    """What a site covers, as one vector."""
    return torch.cat([tensors[name][index].flatten() for name, index in site.covers.items()])


def decoy_directions(
    recipe: Recipe, state: Checkpoint, contrasts: list[Contrast], plant: Site, decoys: list[Site], seed: int
) -> dict[str, Tensor]:
    """On each decoy a direction with the plant's mean tag difference as norm, orthogonal to every ∇M there."""
    gradients = [
        [dy.steps.gradient(recipe, state, b).gradients for b in (c.base, c.source)] for c in contrasts
    ]
    norm = np.mean([float((covered(s, plant) - covered(b, plant)).norm()) / 2 for b, s in gradients])
    asked = replace(recipe, loss=lambda model, batch: MEASURE(model, batch).mean())
    slopes = [dy.steps.gradient(asked, state, c.probe).gradients for c in contrasts]
    directions: dict[str, Tensor] = {}
    for number, decoy in enumerate(decoys):
        span = torch.linalg.qr(torch.stack([covered(s, decoy) for s in slopes], dim=1).double())[0]
        drawn = torch.randn(len(span), generator=torch.Generator().manual_seed(1000 * seed + number)).double()
        drawn -= span @ (span.T @ drawn)
        drawn *= norm / drawn.norm()
        for name, index in decoy.covers.items():
            delta = directions.setdefault(name, torch.zeros_like(state.parameters[name]))
            size = delta[index].numel()
            delta[index] = drawn[:size].reshape(delta[index].shape).to(delta.dtype)
            drawn = drawn[size:]
    return directions


# --- methods ----------------------------------------------------------------------------------------------


def baselines(
    recipe: Recipe, state: Checkpoint, contrasts: list[Contrast], sites: list[Site]
) -> dict[str, np.ndarray]:
    """Scores that replay nothing: norms and cosines of the two gradients, the size of the update."""
    rows: dict[str, list[list[float]]] = {
        n: [] for n in ("gradient norm", "‖Δθ‖", "1 − gradient cosine", "‖g_R − g_U‖")
    }
    for c in contrasts:
        base, source = (dy.steps.gradient(recipe, state, b).gradients for b in (c.base, c.source))
        after = dy.steps.steps_from(recipe, state, [base])[0]
        moved = {name: after[name] - p for name, p in state.parameters.items()}
        pairs = [(covered(base, s), covered(source, s)) for s in sites]
        rows["gradient norm"].append([float(r.norm()) for _, r in pairs])
        rows["‖Δθ‖"].append([float(covered(moved, s).norm()) for s in sites])
        rows["1 − gradient cosine"].append(
            [1 - float(torch.cosine_similarity(u, r, dim=0)) for u, r in pairs]
        )
        rows["‖g_R − g_U‖"].append([float((r - u).norm()) for u, r in pairs])
    return {name: np.mean(values, axis=0) for name, values in rows.items()}


def hook_sites(sites: list[Site], recipe: Recipe, like: dy.Batch) -> tuple[list[int], list[Site]]:
    """Candidates that have an activation of their own, and its site: layer outputs, or a head's z."""
    places, found = [], []
    for i, site in enumerate(sites):
        component, layer, head = (site.coords[key] for key in ("component", "layer", "head"))
        if component == "head":
            name = f"blocks.{layer}.attn.hook_z"
            found.append(Site(site.label, {name: (slice(None), slice(None), head)}))
        elif component in HOOKS:
            found.append(Site(site.label, {HOOKS[str(component)].format(layer=layer): ...}))
        else:
            continue
        places.append(i)
    return places, found


@torch.no_grad()
def activation_patching(
    recipe: Recipe, state: Checkpoint, contrasts: list[Contrast], sites: list[Site]
) -> np.ndarray:
    """|mean change| of the definition's own correct logit when a reliable activation replaces an unreliable one."""
    model = recipe.model
    state.restore(model)
    changes = []
    for c in contrasts:
        _, kept = model.run_with_cache(c.source.tokens)
        plain = float(MEASURE(model, c.base).mean())
        row = []
        for site in sites:
            ((name, index),) = site.covers.items()

            exchange = partial(_exchanged, index=index, source=kept[name])
            with model.hooks(fwd_hooks=[(name, exchange)]):
                row.append(float(MEASURE(model, c.base).mean()) - plain)
        changes.append(row)
    return np.abs(np.mean(changes, axis=0))


def _exchanged(activation: Tensor, hook: object, index: Any, source: Tensor) -> Tensor:
    activation[index] = source[index]
    return activation


def scores(
    world: Recipe, plain: Recipe, state: Checkpoint, task: dy.tasks.AliasTask, sites: list[Site]
) -> dict[str, np.ndarray]:
    """Every method's score for every candidate; NaN where a method says nothing about one."""
    contrasts = task.contrasts()
    few = [c for name in ("Dt3", "Df4") for c in task.impulses(state.step, IMPULSE, (name,))[:4]]
    places, outputs = hook_sites(sites, plain, contrasts[0].base)
    found: dict[str, np.ndarray] = {}

    def among(values: np.ndarray) -> np.ndarray:
        full = np.full(len(sites), np.nan)
        full[places] = values
        return full

    for label, at in {"fresh": state.with_fresh_optimizer(), "stored": state}.items():
        verbs: dict[str, Callable[..., xr.Dataset]] = {
            "patch_gradients": dy.patch_gradients,
            "patch_updates": dy.patch_updates,
            "attribute_step, integrated": partial(dy.attribute_step, method="integrated"),
            "attribute_step, first order": partial(dy.attribute_step, method="first_order"),
        }
        for name, verb in verbs.items():
            result = verb(world, at, contrasts, sites, MEASURE)
            found[f"{name}, {label}"] = mean_size(result["attribution" if "attribute" in name else "effect"])
        signals = dy.patch_signals(world, at, contrasts, outputs, MEASURE)
        found[f"patch_signals, {label}"] = among(mean_size(signals["effect"]))
    impulse = dy.patch_window(world, state, few, sites, MEASURE).squeeze("step")
    found[f"impulse response, {IMPULSE} steps"] = mean_size(impulse["effect"])
    found |= baselines(world, state, contrasts, sites)
    found["activation patching"] = among(activation_patching(plain, state, contrasts, outputs))
    return found


def one_plant(folder: Path, label: str, out: Path) -> pd.DataFrame:
    """Truth and scores of all candidates in one planted world; kept as CSV under `out`."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    run = Trajectory.open(folder)
    task = dy.tasks.load(run.config)
    seed = int(run.config["seed"])
    path = out / f"{run_key(run)}-{label.replace(' ', '-')}.csv"
    if path.exists():
        return pd.read_csv(path)
    plain = task.recipe()
    sites = (dy.sites.heads if label.startswith("L") else dy.sites.components)(plain.model)
    plant = next((site for site in sites if site.label == label), None)
    if plant is None:
        raise dy.sites.SiteError(
            f"no site {label!r} to plant in; there are {', '.join(s.label for s in sites)}."
        )
    others = [site for site in sites if site.label != label]
    drawn = np.random.default_rng([seed, PLANTS.index(label)]).permutation(len(others))[:N_DECOYS]
    decoys = [others[i] for i in drawn]
    start = run.at(task.config.phases.starts["x2"])
    directions = decoy_directions(plain, start, task.contrasts(), plant, decoys, seed)
    world = dy.tasks.planted(plain, task, plant, directions)
    state = dy.steps.advance(world, start, start.step + WARM_UP, task.batch)
    window = [task.batch(state.step + n) for n in range(WINDOW)]
    retagged = [task.retag(batch) for batch in window]
    training = [replace(c, base=window, source=retagged) for c in task.contrasts()]
    effect = dy.patch_window(world, state, training, sites, MEASURE).squeeze("step")["effect"]
    reliable = effect["set"].values == "Dt3"
    truth = effect.values[reliable].mean(0) - effect.values[~reliable].mean(0)
    table = pd.DataFrame(
        {
            "seed": seed,
            "plant": label,
            "site": [site.label for site in sites],
            "planted": [site.label == label for site in sites],
            "decoy": [site.label in {d.label for d in decoys} for site in sites],
            "truth": truth,
            **scores(world, plain, state, task, sites),
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return table


# --- how well methods do ----------------------------------------------------------------------------------

GIVEN = ("seed", "plant", "site", "planted", "decoy", "truth")


def graded(world: pd.DataFrame, method: str) -> dict[str, float]:
    """One method in one world: rank correlation with |truth|, AUC and top-1 for the plant, ties half."""
    known = world[world[method].notna()]
    planted = known[known["planted"]]
    if planted.empty:
        return {}
    others = known.loc[~known["planted"], method].to_numpy()
    own = float(planted[method].iloc[0])
    wins = (others < own).mean() + (others == own).mean() / 2
    rank = (
        scipy.stats.spearmanr(known["truth"].abs(), known[method]).statistic
        if known[method].nunique() > 1
        else 0.0
    )
    return {"auc": float(wins), "top1": float(own > others.max()), "rank": float(rank), "n": len(known)}


def grades(worlds: list[pd.DataFrame]) -> pd.DataFrame:
    """Every method in every world."""
    methods = [column for column in worlds[0].columns if column not in GIVEN]
    rows = [
        {"method": method, "seed": world["seed"].iloc[0], "plant": world["plant"].iloc[0], **grade}
        for world in worlds
        for method in methods
        if (grade := graded(world, method))
    ]
    return pd.DataFrame(rows)


def table(found: pd.DataFrame) -> str:
    """Means with 95 % t intervals over seeds (each the mean over its plants), the best AUC first."""
    per_seed = found.groupby(["method", "seed"])[["auc", "top1", "rank"]].mean()
    plants = found.groupby("method")["plant"].nunique()
    rows = []
    for method, values in per_seed.groupby("method"):
        cells = [dy.statistics.mean_interval(values[key].to_numpy()) for key in ("auc", "top1", "rank")]
        rows.append((-float(cells[0].estimate), method, cells))
    lines = [
        "| method | AUC of the plant | top-1 | rank correlation with truth | plants |",
        "|---|---|---|---|---|",
    ]
    for _, method, cells in sorted(rows, key=lambda row: row[:2]):
        texts = [f"{float(c.estimate):.2f} [{float(c.low):.2f}, {float(c.high):.2f}]" for c in cells]
        lines.append(f"| {method} | {' | '.join(texts)} | {plants[method]} |")
    chance = float((1 / found["n"]).mean())
    lines.append(f"| {CHANCE} | 0.50 | {chance:.2f} | 0 | |")
    return "\n".join(lines)


def figure(found: pd.DataFrame) -> Figure:
    """AUC and top-1 of every method: mean and interval over seeds, and each plant's mean as a dot."""
    order = found.groupby("method")["auc"].mean().sort_values().index
    drawn = Figure(figsize=(9, 0.3 * len(order) + 1.2), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    chance = {"auc": 0.5, "top1": float((1 / found["n"]).mean())}
    names = {"auc": "AUC of the planted site", "top1": "share of worlds with the plant on top"}
    for ax, (key, name) in zip(axes, names.items(), strict=True):
        for row, method in enumerate(order):
            part = found[found["method"] == method]
            dots = part.groupby("plant")[key].mean()
            ax.plot(dots, [row] * len(dots), "o", color="0.75", markersize=4)
            mean, low, high = dy.statistics.mean_interval(part.groupby("seed")[key].mean().to_numpy())
            ax.plot([low, high], [row, row], color="C0")
            ax.plot(mean, row, "o", color="C0")
        ax.axvline(chance[key], color="k", linestyle=":", linewidth=1)
        ax.set(xlabel=name, xlim=(-0.05, 1.05))
    axes[0].set_yticks(range(len(order)), order)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of_runs(__doc__, "planted")
    parser.add_argument("--plants", nargs="+", default=list(PLANTS), choices=PLANTS)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(argv)
    jobs = [(folder, plant, given.out) for folder in given.runs for plant in given.plants]
    worlds = each(one_plant, jobs, given.workers, "world")
    found = grades(worlds)
    found.to_csv(given.out / "grades.csv", index=False)
    truth = [w.loc[w["planted"], "truth"].abs().iloc[0] >= w["truth"].abs().max() for w in worlds]
    seeds = ", ".join(str(s) for s in sorted(found["seed"].unique()))
    text = (
        f"{table(found)}\n\nSeeds {seeds}; plants {', '.join(given.plants)}; mean [95 % t interval over seeds]. "
        f"The plant has the largest true effect in {sum(truth)} of {len(truth)} worlds. "
        f"{stamp(__file__)}"
    )
    (given.out / "planted.md").write_text(text + "\n")
    conclude(given, "planted", text, figure(found))


if __name__ == "__main__":
    main()
