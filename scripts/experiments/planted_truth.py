"""Do methods find the place where the tag can act? About 80 seconds a planted site and fork, on one core.

Runs of scripts/experiments/runs.py, both forks of each seed; docs/analyses/truth.md, question 4. In X2 every
definition's gradient outside a planted site is averaged over both tags, so the tag's difference can be written
there alone; three decoys get a tag difference of the same norm, orthogonal to the measure's gradient. The truth of
a site is what exchanging the tags' gradients there through a window of X2 does to Dt3 − Df4. Methods give every
candidate a score, from single definitions or from the training on both tags; it is held against the plant and the
truth. Worlds in which another site has a larger true effect than the plant are reported apart.

    .venv/bin/python scripts/experiments/planted_truth.py ../runs-400 --workers 2 --readme
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
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
from sklearn.metrics import average_precision_score
from torch import Tensor

import dynamics as dy
from checkpoints import Checkpoint, CheckpointPair, Trajectory
from dynamics import results
from dynamics.plots import figures
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import Site
from dynamics.tasks import AliasTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.difference import difference
from scripts.shared.forks import Found, asked, command_line, seeds_said
from scripts.shared.into_readme import bootstrap_interval, bootstrapped, conclude, markdown, stamp

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


def along_both(
    world: Recipe, state: Checkpoint, task: AliasTask, window: list[dy.Batch], sites: list[Site]
) -> dict[str, np.ndarray]:
    """Scores from training under the tags as they are and exchanged: in the first batch, or all of the window.

    The impulse response; the account's difference; and what the parameters of one's end do in the other's.
    """
    measure, probe = difference(task)
    paths = (window, list(map(task.retag, window)))
    first = window[:IMPULSE]
    impulse = dy.Contrast(first, [paths[1][0], *first[1:]], probe)
    moved = dy.patch_window(world, state, [impulse], sites, measure).squeeze("step")
    accounts = [
        dy.attribute_training(world, state, path, sites, {"D": probe}, measure)["attribution"].sum("step")
        for path in paths
    ]
    ends = [
        dy.steps.advance(world, state, state.step + WINDOW, lambda step, path=path: path[step - state.step])
        for path in paths
    ]
    exchanged = dy.patch_parameters(world, CheckpointPair(*ends), [Contrast(probe)], sites, measure)
    return {
        f"impulse response, {IMPULSE} steps": mean_size(moved["effect"]),
        "attribute_training, both tags": mean_size(accounts[1] - accounts[0]),
        "patch_parameters, both tags": mean_size(exchanged["effect"]),
    }


def scores(
    world: Recipe,
    plain: Recipe,
    state: Checkpoint,
    task: AliasTask,
    window: list[dy.Batch],
    sites: list[Site],
) -> dict[str, np.ndarray]:
    """Every method's score for every candidate; NaN where a method says nothing about one."""
    contrasts = task.contrasts()
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
    found |= along_both(world, state, task, window, sites)
    found |= baselines(world, state, contrasts, sites)
    found["activation patching"] = among(activation_patching(plain, state, contrasts, outputs))
    return found


def one_world(task: AliasTask, run: Trajectory, plant: str) -> xr.Dataset:
    """Of all candidates in the world of a plant: `truth`, `planted`, `decoy` [site], `score` [by, site]."""
    plain, seed = task.recipe(), int(run.config["seed"])
    sites = (dy.sites.heads if plant.startswith("L") else dy.sites.components)(plain.model)
    (site,) = [site for site in sites if site.label == plant]
    others = [site for site in sites if site.label != plant]
    drawn = np.random.default_rng([seed, PLANTS.index(plant)]).permutation(len(others))[:N_DECOYS]
    decoys = [others[i] for i in drawn]
    start = run.at(task.config.phases.starts["x2"])
    directions = decoy_directions(plain, start, task.contrasts(), site, decoys, seed)
    world = dy.tasks.planted(plain, task, site, directions)
    state = dy.steps.advance(world, start, start.step + WARM_UP, task.batch)
    window = [task.batch(state.step + n) for n in range(WINDOW)]
    measure, probe = difference(task)
    both_tags = dy.Contrast(window, list(map(task.retag, window)), probe)
    truth = dy.patch_window(world, state, [both_tags], sites, measure)["effect"]
    found = scores(world, plain, state, task, window, sites)
    return xr.Dataset(
        {
            "truth": ("site", truth.values.reshape(len(sites))),
            "planted": ("site", [int(site.label == plant) for site in sites]),
            "decoy": ("site", [int(site in decoys) for site in sites]),
            "score": (("by", "site"), np.array(list(found.values()))),
        },
        {"site": [site.label for site in sites], "by": list(found)},
        {"provenance": results.provenance(step=state.step, measure=MEASURE.name)},
    )


# --- how well methods do ----------------------------------------------------------------------------------

FIGURES = {
    "precision": "average precision of the plant,\nwhere it is the largest true effect",
    "rank": "rank correlation with the truth,\nall worlds",
}


def graded(world: xr.Dataset, method: str) -> dict[str, float]:
    """One method in one world: average precision of the plant and of the largest |truth| (1 / its rank), and ρ."""
    score = world["score"].sel(by=method).values
    known = ~np.isnan(score)
    planted = world["planted"].values[known]
    if not planted.any():
        return {}
    score, truth = score[known], np.abs(world["truth"].values)
    rank = scipy.stats.spearmanr(truth[known], score).statistic if np.ptp(score) else 0.0
    return {
        "precision": float(average_precision_score(planted, score)),
        "of the largest": float(average_precision_score(truth[known] == truth.max(), score))
        if known[truth.argmax()]
        else np.nan,
        "rank": float(rank),
        "largest": bool(world["planted"].values[truth.argmax()]),
        "decoy": bool(world["decoy"].values[truth.argmax()]),
        "n": len(planted),
    }


def grades(found: Mapping[str, Found]) -> pd.DataFrame:
    """A row for every method in every world: of each plant, seed and fork."""
    rows = [
        {"plant": plant, "seed": seed, "method": str(method), **grade}
        for plant, seeds in found.items()
        for seed, forks in seeds.items()
        for world in forks
        for method in world["by"].values
        if (grade := graded(world, str(method)))
    ]
    return pd.DataFrame(rows)


def per_seed(found: pd.DataFrame, key: str) -> np.ndarray:
    """The mean over the worlds of each seed that has one."""
    return found.groupby("seed")[key].mean().dropna().to_numpy()


def chance(found: pd.DataFrame) -> float:
    """The mean average precision of an order drawn at random: of n candidates Σ 1/k / n."""
    return float(np.mean([(1 / np.arange(1, n + 1)).mean() for n in found["n"]]))


def table(found: pd.DataFrame) -> list[str]:
    """Lines: means over seeds with bootstrap intervals, the best at finding the plant first."""
    rows = []
    for method, of_method in found.groupby("method"):
        parts = [of_method[of_method["largest"] == largest] for largest in (True, False)]
        cells = [bootstrapped(per_seed(part, "precision")) for part in parts]
        cells.append(bootstrapped(per_seed(parts[1], "of the largest")))
        cells.append(bootstrapped(per_seed(of_method, "rank")))
        rows.append([str(method), *cells, str(of_method["plant"].nunique())])
    head = ["method", "average precision of the plant, where it is the largest true effect"]
    head += ["of the plant, where it is not", "of the largest there"]
    return markdown(
        [*head, "rank correlation with the truth", "plants"],
        [
            *sorted(rows, key=lambda row: (-float(row[1].split()[0]), row[0])),
            [CHANCE, *[f"{chance(found):.2f}"] * 3, "0", ""],
        ],
    )


def worlds_said(found: pd.DataFrame) -> str:
    """In how many worlds the plant has the largest true effect, and in how many a decoy has."""
    one = found[found["method"] == found["method"].iloc[0]]
    return (
        f"The plant has the largest true effect in {one['largest'].sum()} of {len(one)} worlds, a decoy in "
        f"{one['decoy'].sum()}."
    )


@figures.styled
def draw(found: pd.DataFrame) -> Figure:
    """Every method's average precision, where the plant is the truth, and rank: mean over seeds, plants as dots."""
    shown = found[found["largest"]]
    methods = dict(tuple(shown.groupby("method")))
    order = sorted(methods, key=lambda method: per_seed(methods[method], "precision").mean())
    figure = Figure(figsize=(9, 0.3 * len(order) + 1.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (key, name), lowest in zip(axes, FIGURES.items(), (0, -1), strict=True):
        for row, method in enumerate(order):
            part = shown if key == "precision" else found
            part = part[part["method"] == method]
            dots = part.groupby("plant")[key].mean()
            ax.plot(
                dots, [row] * len(dots), "o", color="0.75", markersize=4, clip_on=False, label="one plant"
            )
            mean, low, high = bootstrap_interval(per_seed(part, key))
            ax.plot([low, high], [row, row], color="C0", clip_on=False)
            ax.plot(mean, row, "o", color="C0", clip_on=False, label="mean over seeds, 95 %")
        nothing = chance(found) if key == "precision" else 0
        ax.axvline(nothing, color="k", linestyle=":", linewidth=1, label="chance")
        ax.set(xlabel=name, xlim=(lowest, 1), xticks=np.linspace(lowest, 1, 5 if lowest else 6))
    axes[0].set_yticks(range(len(order)), order)
    handles, labels = axes[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Which method finds a planted place ({found['seed'].nunique()} seeds)")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the worlds, ask the methods, say and draw."""
    given = command_line(__doc__, "planted", arguments)
    both = {plant: asked(partial(one_world, plant=plant), given, plant) for plant in PLANTS}
    explored, confirming = (grades({plant: halves[i] for plant, halves in both.items()}) for i in (0, 1))
    text = ["Explored:", "", *table(explored)]
    if given.confirm:
        text += ["", "Confirmed:", "", *table(confirming)]
    seeds = seeds_said(*both[PLANTS[0]])
    text += [
        "",
        f"Plants {', '.join(PLANTS)}; mean [95 % bootstrap interval over seeds]; {seeds}. {worlds_said(explored)} "
        f"{stamp(__file__)}",
    ]
    conclude(given, "planted", "\n".join(text), draw(explored))


if __name__ == "__main__":
    main()
