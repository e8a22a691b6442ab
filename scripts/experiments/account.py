"""What wrote Dt3 − Df4, and is the account causal? About ten minutes a run, on one core.

The analysis was written down before its runs were trained: docs/analyses/account.md. Of each run of the default
alias study: the account of all of X2 by component and source; windows of 10, 50 and 200 steps with the tags of one
site's gradients exchanged, beside what might foretell them; 40 trainings without a random half of the definitions,
beside scores of single definitions. What is found is kept for each run in --out; the same command goes on.

    .venv/bin/python scripts/experiments/account.py runs/default-* --workers 2 --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
import torch
import xarray as xr
from matplotlib.figure import Figure

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics import results, steps
from dynamics.batch import Batch
from dynamics.comparison import perturbed
from dynamics.measures import LogitMeasure
from dynamics.plots import figures
from dynamics.randomness import generator
from dynamics.sites import Site
from dynamics.tasks import AliasTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.difference import asked_by_set, difference
from scripts.shared.into_readme import conclude, interval, markdown, stamp
from scripts.shared.runs import each, parser_of_runs, run_key, stored

AFTER = (10, 50, 200)
"""Lengths of windows, in steps."""
HEADS_UNTIL = 50
EARLY = 50
NOISE = 1e-4
"""Relative size of the perturbation that ceilings are taken under."""
HALVES = 40
RETRAINED = 100
EVERY = 10
"""Steps between those whose batches are attributed row by row."""

Array = npt.NDArray[np.float64]


def own_rows(task: AliasTask) -> list[Site]:
    """The row of the token embedding of each alias of Dt3 and Df4."""
    rows = dy.sites.rows(task.model(), "embed.W_E")
    return [rows[task.alias(i)] for name in ("Dt3", "Df4") for i in task.sets[name]]


def whole(task: AliasTask, start: Checkpoint) -> xr.Dataset:
    """The account of all of X2, by component, embedding row and source, in entries of ten steps."""
    recipe, first, end = task.recipe(), start.step, task.config.phases.starts["end"]
    sites = [*dy.sites.components(recipe.model), *own_rows(task)]
    return dy.attribute_training(
        recipe,
        start,
        task.batches(first, end),
        sites,
        asked_by_set(task),
        dy.measures.correct_logit,
        sources=task.sources,
        every=10,
    )


def paths(task: AliasTask, start: Checkpoint) -> xr.Dataset:
    """Accounts of D over the longest window, as trained and with the tags of X2's definitions exchanged."""
    recipe, (measure, probe) = task.recipe(), difference(task)
    sites = [*dy.sites.components(recipe.model), *dy.sites.heads(recipe.model)]
    batches = [task.batch(start.step + i) for i in range(max(AFTER))]
    found = [
        dy.attribute_training(recipe, start, path, sites, {"D": probe}, measure).isel(example=0, drop=True)
        for path in (batches, list(map(task.retag, batches)))
    ]
    return results.concat(found, "direction", ["as trained", "retagged"])


def windows(task: AliasTask, start: Checkpoint) -> xr.Dataset:
    """Effects on D of exchanging the tags in one component's or head's gradients for a window of steps."""
    recipe, (measure, probe) = task.recipe(), difference(task)
    batches = [task.batch(start.step + i) for i in range(max(AFTER))]
    retagged = list(map(task.retag, batches))
    components, heads = dy.sites.components(recipe.model), dy.sites.heads(recipe.model)

    def window(
        state: Checkpoint, source: Sequence[Batch], sites: Sequence[Site], longest: int
    ) -> xr.DataArray:
        after = [n for n in AFTER if n <= longest]
        contrast = dy.Contrast(batches[:longest], source[:longest], probe)
        found = dy.patch_window(recipe, state, [contrast], sites, measure, after)
        return found["effect"].isel(example=0, drop=True).assign_coords(step=after).reset_coords(drop=True)

    def single(state: Checkpoint) -> xr.DataArray:
        contrast = dy.Contrast(batches[0], retagged[0], probe)
        found = dy.patch_gradients(recipe, state, [contrast], [*components, *heads], measure)
        return found["effect"].isel(example=0, drop=True).reset_coords(drop=True)

    longest = max(AFTER)
    return xr.Dataset(
        {
            "window": window(start, retagged, components, longest),
            "window under noise": window(perturbed(start, 1, NOISE), retagged, components, longest),
            "impulse": window(start, [retagged[0], *batches[1:]], components, longest),
            "window of heads": window(start, retagged, heads, HEADS_UNTIL).rename(site="head_site"),
            "fresh": single(start.with_fresh_optimizer()),
            "stored": single(start),
            "distance": _distance(recipe, start, batches, retagged, [*components, *heads]),
        },
        attrs={"provenance": results.provenance(verb="patch_window", step=start.step, measure=measure.name)},
    )


def _distance(
    recipe: dy.Recipe, start: Checkpoint, one: Sequence[Batch], other: Sequence[Batch], sites: Sequence[Site]
) -> xr.DataArray:
    """‖Δθ‖ by site between the ends of two paths, after each length of window."""
    found = []
    for n in AFTER:
        ends = [
            steps.advance(recipe, start, start.step + n, lambda step, path=path: path[step - start.step])
            for path in (one, other)
        ]
        squares = {name: (p - ends[1].parameters[name]) ** 2 for name, p in ends[0].parameters.items()}
        found.append([float(sum(squares[n][i].sum() for n, i in s.covers.items())) ** 0.5 for s in sites])
    coords = {"step": list(AFTER), "site": [s.label for s in sites]}
    return xr.DataArray(found, coords, ("step", "site"))


def without_halves(task: AliasTask, start: Checkpoint) -> xr.Dataset:
    """D after training without the definitions of random halves of the aliases, and scores of each definition."""
    recipe, (measure, probe) = task.recipe(), difference(task)
    batches = [task.batch(start.step + i) for i in range(RETRAINED)]
    label = partial(task.sources, by="integer")
    defined = sorted({s for b in batches for s in label(b) if s.startswith("definition of")})
    kept = np.zeros((HALVES, len(defined)), dtype=bool)
    for half in range(HALVES):
        draw = generator(task.config.seed, "halves of the definitions", half)
        kept[half, draw.permutation(len(defined))[: len(defined) // 2]] = True

    def ends(state: Checkpoint) -> Array:
        return np.array(
            [_end(recipe, state, _thinned(batches, label, defined, k), measure, probe) for k in kept]
        )

    scores = {
        "account": _accounted(recipe, start, batches, label, defined, measure, probe),
        **_attributed(recipe, start, batches, label, defined, measure, probe),
        "random": generator(task.config.seed, "random scores").standard_normal(len(defined)),
    }
    return xr.Dataset(
        {
            "kept": (("half", "definition"), kept.astype(np.int64)),
            "end": ("half", ends(start)),
            "end under noise": ("half", ends(perturbed(start, 2, NOISE))),
            **{name: ("definition", found) for name, found in scores.items()},
        },
        coords={"definition": defined},
        attrs={
            "provenance": results.provenance(verb="attribute_training", step=start.step, measure=measure.name)
        },
    )


Labelling = Callable[[Batch], list[str]]


def _thinned(
    batches: Sequence[Batch], label: Labelling, defined: Sequence[str], kept: npt.NDArray[np.bool_]
) -> list[Batch]:
    """The batches without the rows of definitions that are not kept."""
    gone = {name for name, stays in zip(defined, kept, strict=True) if not stays}
    return [b[torch.tensor([source not in gone for source in label(b)])] for b in batches]


def _end(
    recipe: dy.Recipe, start: Checkpoint, batches: Sequence[Batch], measure: LogitMeasure, probe: Batch
) -> float:
    last = steps.advance(recipe, start, start.step + len(batches), lambda step: batches[step - start.step])
    model = recipe.model
    with torch.no_grad():
        found = torch.func.functional_call(model, dict(last.parameters), (probe.tokens,))
    logits = found[torch.arange(len(probe)), probe.target_pos]
    return float(measure.from_logits(logits, probe).double().mean())


def _accounted(
    recipe: dy.Recipe,
    start: Checkpoint,
    batches: Sequence[Batch],
    label: Labelling,
    defined: Sequence[str],
    measure: LogitMeasure,
    probe: Batch,
) -> Array:
    everything = [Site("all", dict.fromkeys(start.parameters, ...))]
    found = dy.attribute_training(
        recipe, start, batches, everything, {"D": probe}, measure, sources=label, every=len(batches)
    )
    written: Array = found["attribution"].sum(("step", "site", "example")).sel(source=list(defined)).values
    return written


def _attributed(
    recipe: dy.Recipe,
    start: Checkpoint,
    batches: Sequence[Batch],
    label: Labelling,
    defined: Sequence[str],
    measure: LogitMeasure,
    probe: Batch,
) -> dict[str, Array]:
    """Row attributions of every tenth step, summed by definition: through the optimizer's step, and TracIn's."""
    plain = replace(recipe, optimizer=partial(torch.optim.SGD, lr=1e-6), scheduler=None, clip=None)
    scores = {"attribute_examples": np.zeros(len(defined)), "TracIn": np.zeros(len(defined))}
    state = start
    asked = [dy.Contrast(None, None, probe, {"example": "D"})]
    for n in range(0, len(batches), EVERY):
        state = steps.advance(recipe, state, start.step + n, lambda step: batches[step - start.step])
        named = label(batches[n])
        for name, (how, at) in {
            "attribute_examples": (recipe, state),
            "TracIn": (plain, replace(state, optimizer=None, scheduler=None, step=0)),
        }.items():
            rows = dy.attribute_examples(how, at, batches[n], asked, measure)["attribution"].values[0]
            for source, written in zip(named, rows, strict=True):
                if source in defined:
                    scores[name][defined.index(source)] += written
    return scores


PARTS: Mapping[str, Callable[[AliasTask, Checkpoint], xr.Dataset]] = {
    "whole": whole,
    "paths": paths,
    "windows": windows,
    "halves": without_halves,
}


def of_run(folder: Path, out: Path) -> dict[str, xr.Dataset]:
    """All that is asked of one run, from files where it is there."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run = Trajectory.open(folder)
    task = dy.tasks.aliases.load(run.config)
    start = run.at(task.config.phases.starts["x2"])
    return {
        name: stored(out / run_key(run) / f"{name}.h5", partial(compute, task, start))
        for name, compute in PARTS.items()
    }


# --- what it comes to -------------------------------------------------------------------------------------

FORETOLD_BY = ("account", "fresh step", "stored step", "impulse", "distance")
Found = Sequence[Mapping[str, xr.Dataset]]


def written(found: Found) -> list[str]:
    """Lines: what each source, component and embedding row wrote into D, early and over all of X2."""
    accounts = [results.difference(one["whole"], "Dt3", "Df4") for one in found]
    rows = []

    def row(name: str, part_of: Callable[[xr.Dataset], xr.DataArray]) -> None:
        parts = [part_of(account) for account in accounts]
        ends = [int(account["step"][0]) + EARLY for account in accounts]
        early = [float(part.sel(step=slice(None, end)).sum()) for part, end in zip(parts, ends, strict=True)]
        rows.append([name, interval(early), interval([float(part.sum()) for part in parts])])

    def of_components(account: xr.Dataset) -> xr.DataArray:
        return account["attribution"].isel(site=account["level"].values == "components")

    row("change of D", lambda account: account["value"].diff("step"))
    row("account, all of it", of_components)
    for source in accounts[0]["source"].values:
        row(f"source: {source}", lambda account, source=source: of_components(account).sel(source=source))
    for site in of_components(accounts[0])["site"].values:
        row(f"component: {site}", lambda account, site=site: of_components(account).sel(site=site))
    row(
        "own rows of the token embedding",
        lambda account: account["attribution"].isel(site=account["level"].values == "rows"),
    )
    row(
        "all other rows",
        lambda account: (
            account["attribution"].sel(site="embed")
            - account["attribution"].isel(site=account["level"].values == "rows").sum("site")
        ),
    )
    lines = markdown(["mean over runs, logits", f"first {EARLY} steps", "all of X2"], rows)
    gaps = []
    for account in accounts:
        change = float(account["value"][-1] - account["value"][0])
        total = float(of_components(account).sum())
        gaps.append([abs(total - change) / abs(change), float(abs(account["residual"]).sum()) / abs(change)])
    worst, mean = np.max(gaps, axis=0), np.mean(gaps, axis=0)
    return [
        *lines,
        "",
        f"Sum less change, of the change: {100 * mean[0]:.2f} % on average, {100 * worst[0]:.2f} % at worst; "
        f"sum of the residuals' sizes {100 * mean[1]:.0f} % on average.",
    ]


def agreements(found: Found) -> pd.DataFrame:
    """Correlation over sites of what might foretell the window with the window, by run: one row each."""
    rows = []
    for number, one in enumerate(found):
        windows, paths = one["windows"], one["paths"]
        components = [str(s) for s in windows["impulse"].dropna("site", how="all")["site"].values]
        heads = [str(s) for s in windows["head_site"].values]
        for n in AFTER:
            for level, names in (("components", components), ("heads", heads)):
                if level == "heads" and n > HEADS_UNTIL:
                    continue
                for name, scores in _scores(windows, paths, level, names, n).items():
                    truth = _window(windows, level, names, n)
                    rows.append(
                        {
                            "run": number,
                            "level": level,
                            "steps": n,
                            "by": name,
                            "spearman": float(scipy.stats.spearmanr(scores, truth).statistic),
                            "pearson": float(scipy.stats.pearsonr(scores, truth).statistic),
                        }
                    )
    return pd.DataFrame(rows)


def _window(windows: xr.Dataset, level: str, names: Sequence[str], n: int) -> Array:
    if level == "heads":
        return windows["window of heads"].sel(step=n, head_site=list(names)).values
    return windows["window"].sel(step=n, site=list(names)).values


def _scores(
    windows: xr.Dataset, paths: xr.Dataset, level: str, names: Sequence[str], n: int
) -> dict[str, Array]:
    """By name, what each of several quantities says of the sites."""
    sites = list(names)
    until = paths["attribution"].isel(step=slice(0, n + 1)).sum("step").sel(site=sites)
    found = {
        "account": (until.sel(direction="retagged") - until.sel(direction="as trained")).values,
        "fresh step": windows["fresh"].sel(site=sites).values,
        "stored step": windows["stored"].sel(site=sites).values,
        "distance": windows["distance"].sel(step=n, site=sites).values,
    }
    if level == "components":
        found["impulse"] = windows["impulse"].sel(step=n, site=sites).values
        found["window under noise"] = windows["window under noise"].sel(step=n, site=sites).values
    return found


def foretold(table: pd.DataFrame) -> list[str]:
    """Lines: mean correlations with the window over runs, and how far the account is above each other one."""
    rows = []
    for (level, n), part in table.groupby(["level", "steps"], sort=False):
        by = part.pivot(index="run", columns="by", values="spearman")
        linear = part.pivot(index="run", columns="by", values="pearson")
        for name in [b for b in (*FORETOLD_BY, "window under noise") if b in by]:
            above = "–" if name in ("account", "window under noise") else interval(by["account"] - by[name])
            rows.append([f"{level}, {n} steps", name, interval(by[name]), interval(linear[name]), above])
    return markdown(
        ["window", "foretold by", "Spearman", "Pearson", "account's Spearman above it"],
        rows,
    )


def linear_datamodeling(found: Found) -> pd.DataFrame:
    """Spearman's correlation over the halves between D and the sum of the scores that stay, by run."""
    rows = []
    for one in found:
        halves = one["halves"]
        kept, end = halves["kept"].values, halves["end"].values
        scores = {
            name: kept @ halves[name].values for name in ("account", "attribute_examples", "TracIn", "random")
        }
        scores["the same under noise"] = halves["end under noise"].values
        rows.append(
            {name: float(scipy.stats.spearmanr(score, end).statistic) for name, score in scores.items()}
        )
    return pd.DataFrame(rows)


@figures.styled
def draw(table: pd.DataFrame, halves: pd.DataFrame) -> Figure:
    """Left, what foretells the window over components; right, linear datamodeling scores. Means, t intervals."""
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    of_components = table[table["level"] == "components"]
    names = [*FORETOLD_BY, "window under noise"]
    for i, name in enumerate(names):
        for j, n in enumerate(AFTER):
            chosen = of_components[(of_components["by"] == name) & (of_components["steps"] == n)]["spearman"]
            mean, low, high = map(float, dy.statistics.mean_interval(chosen.to_numpy()))
            colour = ("#56B4E9", "#0072B2", "#000000")[j]
            left.errorbar(
                i + 0.2 * (j - 1), mean, [[mean - low], [high - mean]], fmt="o", color=colour, markersize=5
            )
    for j, n in enumerate(AFTER):
        left.plot([], [], "o", color=("#56B4E9", "#0072B2", "#000000")[j], label=f"{n} steps")
    left.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    left.set_ylabel("Spearman's correlation over components")
    left.set_title(f"What foretells a window of exchanged tags ({len(halves)} runs)", fontsize=10)
    figure.legend(loc="outside lower left", ncols=len(AFTER), frameon=False, fontsize=8)
    for i, name in enumerate(halves):
        mean, low, high = map(float, dy.statistics.mean_interval(halves[name].to_numpy()))
        right.errorbar(i, mean, [[mean - low], [high - mean]], fmt="o", color="#000000", markersize=5)
    right.set_xticks(range(halves.shape[1]), list(halves), rotation=20, ha="right", fontsize=8)
    right.set_ylabel("linear datamodeling score")
    right.set_title(f"Definitions left out ({len(halves)} runs)", fontsize=10)
    for axes in (left, right):
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=1)
        axes.set_ylim(-1, 1.05)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute what is missing, and say what it comes to."""
    parser = parser_of_runs(__doc__, "account")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    given: Any = parser.parse_args(arguments)
    found = each(of_run, [(folder, given.out) for folder in given.runs], given.workers)
    table, halves = agreements(found), linear_datamodeling(found)
    text = [
        *written(found),
        "",
        *foretold(table),
        "",
        *markdown(
            ["score of definitions", "linear datamodeling score", "account's above it"],
            [
                [n, interval(halves[n]), "–" if n == "account" else interval(halves["account"] - halves[n])]
                for n in halves
            ],
        ),
        "",
        f"n = {len(found)} runs; means with 95 % t intervals over runs. Analysis fixed beforehand in "
        f"`docs/analyses/account.md`. {stamp(__file__)}",
    ]
    conclude(given, "account", "\n".join(text), draw(table, halves), {"script": Path(__file__).name})


if __name__ == "__main__":
    main()
