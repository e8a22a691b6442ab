"""Which parts of what was learnt suffice, and which are necessary? Half a minute a run, trained where missing.

Parameters are exchanged between two checkpoints of a run, one component at a time (`patch_parameters`). In runs
of the alias study (given by their folders): the end of X1 and the end of X2, on the untrained questions of Dt3. In
runs of the three small languages, seeds 300 to 311 (trained into --languages where they are missing): the last
stored step before the held-out answers are right one time in four, and the first at which they are right three
times in four; in `facts` of the late facts, in the phase that states them. Sufficient: the later checkpoint's
component in the earlier one. Necessary: the earlier one's in the later. Both are shares of what the whole exchange
changes, beside the same with each tensor's change shuffled, and beside what the account says was written there.

    .venv/bin/python scripts/experiments/transfer.py runs/default-* --accounts runs/account --workers 2 --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint, CheckpointPair, Trajectory
from dynamics import results
from dynamics.batch import Batch
from dynamics.config import AcronymsRun, FactsRun, IoiRun, RunConfig
from dynamics.plots import figures
from dynamics.plots.figures import Figure
from dynamics.randomness import generator
from dynamics.sites import Site

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import conclude, interval, markdown, stamp
from scripts.shared.runs import each, parser_of_runs, run_key, stored

LANGUAGES = {
    "facts": (FactsRun, "late"),
    "acronyms": (AcronymsRun, "heldout"),
    "ioi": (IoiRun, "heldout"),
}
"""Of each small language its config, and the questions that tell when it is learnt."""
LEGEND = {
    "sufficient": "sufficient: brought into the earlier checkpoint",
    "necessary": "necessary: lost from the later checkpoint",
    "account": "written there, by the account",
}
ROWS = {"own rows": "embed:\nown rows", "other rows": "embed:\nother rows"}
"""What the picture calls rows of the token embedding."""
SEEDS = range(300, 312)
BEFORE, AFTER = 0.25, 0.75
"""Accuracies on held-out questions that the step before and the step after lie at."""
MEASURES = {m.name: m for m in (dy.measures.correct_logit, dy.measures.accuracy)}
ASKED = ("sufficient", "necessary")
SHUFFLED = tuple(f"{name}, shuffled" for name in ASKED)
COLOURS = (figures.BLUE, figures.ORANGE, figures.GREEN)
TITLES = {
    "aliases": "Aliases: answers to those defined under the reliable tag, end of X1 and end of X2",
    "facts": "Late facts",
    "acronyms": "Acronyms",
    "ioi": "Indirect objects",
}


def of_aliases(folder: Path, out: Path) -> xr.Dataset:
    """The end of X1 against the end of X2, on the untrained questions of Dt3; the aliases' own rows apart."""
    run = _open(folder)
    task = dy.tasks.aliases.load(run.config)
    recipe, starts = task.recipe(), task.config.phases.starts
    own = torch.tensor([task.alias(i) for i in task.sets["Dt3"]])
    other = torch.tensor(sorted(set(range(task.d_vocab)) - set(own.tolist())))
    rows = [
        Site(label, {"embed.W_E": (index,)}) for label, index in (("own rows", own), ("other rows", other))
    ]
    pair = CheckpointPair(run.at(starts["x2"]), run.at(starts["end"]))
    compute = partial(exchanged, recipe, pair, task.evaluation["Dt3"], rows, task.config.seed)
    return stored(out / "aliases" / f"{run_key(run)}.h5", compute)


def of_language(name: str, folder: Path, config: RunConfig, out: Path) -> xr.Dataset:
    """The step before against the step after a language, or the late facts, were learnt."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run = dy.training.fit(config, folder)
    task: Any = dy.tasks.load(run.config)
    asked, first = task.evaluation[LANGUAGES[name][1]], task.config.phases.starts.get("late", 0)

    def compute() -> xr.Dataset:
        recipe = task.recipe()
        return exchanged(recipe, _learning(recipe.model, run, asked, first), asked, [], task.config.seed)

    return stored(out / name / f"{run_key(run)}.h5", compute)


def _open(folder: Path) -> Trajectory:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return Trajectory.open(folder)


def _learning(model: nn.Module, run: Trajectory, asked: Batch, first: int) -> CheckpointPair:
    """The last stored checkpoint from `first` on before accuracy passes BEFORE, the first at which it is AFTER."""
    before = None
    for step in (s for s in run.steps if s >= first):
        state = run.at(step)
        with torch.no_grad():
            logits = torch.func.functional_call(model, dict(state.parameters), (asked.tokens,))
        right = float(
            dy.measures.accuracy.from_logits(dy.measures.at_target_pos(logits, asked), asked).mean()
        )
        if right >= AFTER and before is not None:
            return CheckpointPair(before, state)
        if right < BEFORE:
            before = state
    raise SystemExit(f"{run} never goes from {BEFORE} to {AFTER} of its questions right after step {first}.")


def exchanged(
    recipe: dy.Recipe, pair: CheckpointPair, asked: Batch, sites: Sequence[Site], seed: int
) -> xr.Dataset:
    """Shares of the whole change that components, and further sites, bring and take, as learnt and shuffled."""
    sites = [*dy.sites.components(recipe.model), *sites]
    pairs = {
        ASKED[0]: pair,
        ASKED[1]: pair.reversed(),
        SHUFFLED[0]: CheckpointPair(pair.base, _shuffled(pair, seed)),
        SHUFFLED[1]: CheckpointPair(pair.source, _shuffled(pair.reversed(), seed)),
    }
    found = [
        dy.patch_parameters(recipe, one, [dy.Contrast(asked)], sites, MEASURES).isel(example=0, drop=True)
        for one in pairs.values()
    ]
    whole = found[0]["source"] - found[0]["base"]
    signs = xr.DataArray([1, -1, 1, -1], {"exchange": list(pairs)}, "exchange")
    effect = xr.concat([one["effect"] for one in found], "exchange").assign_coords(exchange=list(pairs))
    return xr.Dataset(
        {"share": signs * effect / whole, "before": found[0]["base"], "after": found[0]["source"]},
        coords={"steps": ("end", [pair.base.step, pair.source.step])},
        attrs={"provenance": results.provenance(verb="patch_parameters", step=pair.base.step, seed=seed)},
    )


def _shuffled(pair: CheckpointPair, seed: int) -> Checkpoint:
    """The base with the source's changes in other places of the same tensors: as large, and nothing learnt."""
    draws = generator(seed, "shuffled changes")
    parameters = {}
    for name, value in pair.base.parameters.items():
        change = (pair.source.parameters[name] - value).flatten()
        parameters[name] = value + change[torch.from_numpy(draws.permutation(len(change)))].reshape(
            value.shape
        )
    return replace(pair.base, parameters=parameters)


def account_of(folder: Path, accounts: Path) -> dict[str, float] | None:
    """The share of Dt3's rise over X2 that the account says was written in each site, where it is kept."""
    run = _open(folder)
    path = accounts / run_key(run) / "whole.h5"
    if not path.exists():
        return None
    task, account = dy.tasks.aliases.load(run.config), results.load(path).sel(example="Dt3")
    parts = account["attribution"].sum(("step", "source")) / (account["value"][-1] - account["value"][0])
    of_components = parts.isel(site=account["level"].values == "components")
    own = [task.alias(i) for i in task.sets["Dt3"]]
    of_own = float(
        parts.isel(site=np.isin(account["index"], own) & (account["level"].values == "rows")).sum()
    )
    shares = {str(site): float(of_components.sel(site=site)) for site in of_components["site"].values}
    return {**shares, "own rows": of_own, "other rows": shares["embed"] - of_own}


# --- what it comes to -------------------------------------------------------------------------------------


def table(found: Mapping[str, Sequence[xr.Dataset]], accounts: Sequence[Mapping[str, float]]) -> list[str]:
    """Lines: of each task and site what suffices, what is necessary, and what the account says."""
    rows = []
    for task, runs in found.items():
        for site in map(str, runs[0]["site"].values):
            shares = {name: _shares(runs, name, site) for name in (*ASKED, *SHUFFLED)}
            right = [_shares(runs, name, site, "accuracy") for name in ASKED]
            told = "–"
            if task == "aliases" and len(accounts) == len(runs):
                told = interval([one[site] for one in accounts])
            rows.append([task, site, *map(interval, shares.values()), *map(interval, right), told])
    head = [*ASKED, *SHUFFLED, *(f"{name}, accuracy" for name in ASKED), "account"]
    lines = markdown(["task", "exchanged", *head], rows)
    for task, runs in found.items():
        ends = [[float(one[end].sel(measure="accuracy")) for one in runs] for end in ("before", "after")]
        lines += [
            "",
            f"{task}: accuracy {interval(ends[0])} before, {interval(ends[1])} after, {len(runs)} runs.",
        ]
    return lines


def _shares(
    runs: Sequence[xr.Dataset], exchange: str, site: str, measure: str = "correct_logit"
) -> list[float]:
    return [float(one["share"].sel(exchange=exchange, site=site, measure=measure)) for one in runs]


@figures.styled
def draw(found: Mapping[str, Sequence[xr.Dataset]], accounts: Sequence[Mapping[str, float]]) -> Figure:
    """By component the share that suffices, that is necessary, that the account finds; aliases above the rest."""
    below = [task for task in found if task != "aliases"]
    figure = Figure(figsize=(9.6, 6.4 if below else 3.6))
    layout: Any = [["aliases"] * max(1, len(below)), *([below] if below else [])]
    panels = figure.subplot_mosaic(layout, height_ratios=[5, 4][: len(layout)], sharey=True)
    for task, runs in found.items():
        axes, names = panels[task], list(map(str, runs[0]["site"].values))
        bars: dict[str, list[list[float]]] = {n: [_shares(runs, n, site) for site in names] for n in ASKED}
        if task == "aliases" and len(accounts) == len(runs):
            bars["account"] = [[one[site] for one in accounts] for site in names]
        for i, ((name, values), colour) in enumerate(zip(bars.items(), COLOURS, strict=False)):
            mean, low, high = (np.asarray(v) for v in dy.statistics.mean_interval(np.array(values)))
            places = np.arange(len(values)) + 0.27 * (i - (len(bars) - 1) / 2)
            bounds = [mean - low, high - mean]
            axes.bar(places, mean, 0.25, yerr=bounds, color=colour, label=LEGEND[name], error_kw={"lw": 0.8})
        if task == "aliases":
            axes.set_xticks(range(len(names)), [ROWS.get(name, name) for name in names])
        else:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_title(f"{TITLES[task]} ({len(runs)} runs)")
        axes.axhline(0, color=figures.GREY, linewidth=0.8, zorder=1)
        axes.axhline(1, color=figures.GREY, linewidth=0.8, linestyle=":", zorder=1)
    figure.suptitle(
        "What one component brings alone, what is lost without it, and what training wrote in it\n"
        "(95 % intervals over runs)"
    )
    figure.supylabel("share of the change in the correct logit", fontsize=9)
    figure.legend(*panels["aliases"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, exchange, say and draw."""
    parser = parser_of_runs(__doc__, "transfer")
    parser.add_argument("--languages", type=Path, default=Path("runs/languages"), help="where those runs are")
    parser.add_argument("--accounts", type=Path, default=Path("runs/account"), help="--out of account.py")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    given: Any = parser.parse_args(arguments)
    found = {"aliases": each(of_aliases, [(folder, given.out) for folder in given.runs], given.workers)}
    for name, (config, _) in LANGUAGES.items():
        jobs = [(name, given.languages / f"{name}-{s}", config(seed=s), given.out) for s in SEEDS]
        found[name] = each(of_language, jobs, given.workers)
    accounts = [one for one in (account_of(f, given.accounts) for f in given.runs) if one is not None]
    text = [
        *table(found, accounts),
        "",
        f"Shares of the change of the correct answer's logit, 95 % t intervals over runs. {stamp(__file__)}",
    ]
    conclude(given, "transfer", "\n".join(text), draw(found, accounts), {"script": Path(__file__).name})


if __name__ == "__main__":
    main()
