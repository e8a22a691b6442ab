"""When do reliable and unreliable definitions part, in gradient alignment and in accuracy?

The cosine between the gradient of each alias's definition, as training gives it and under the other tag, and that
of its questions, at log-spaced steps of X1 and X2 of several runs; beside it the accuracy of the sets and where
heads look. An event is the change point of a run's curve: of a piecewise-constant fit along the log-spaced steps.

    .venv/bin/python scripts/alignment.py runs/seeds-fresh/train-5-seed-*/drawn --out runs/alignment --readme
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from into_readme import README, interval, run_key, stamp, write
from matplotlib.figure import Figure

import dynamics as dy
from checkpoints import Checkpoint, Trajectory

POINTS = 22
"""Log-spaced steps of a phase, beside its first."""

PAIRS = {"x1": ("DtQ1", "DfQ2"), "x2": ("Dt3", "Df4")}
"""The reliable and the unreliable set that a phase is about."""

NEW = ("Dt3", "Df4")
"""Sets that X1 does not train: what a definition of a new alias would do."""

ALIGNMENT, TAG, ACCURACY, ATTENTION = (
    "alignment, as trained",
    "alignment, either tag",
    "accuracy",
    "attention",
)

Found = Sequence[dict[str, xr.Dataset]]


def steps_of(task: dy.tasks.AliasTask, phase: str) -> list[int]:
    """The steps of a phase that are measured, from its first to the one after its last."""
    starts = task.config.phases.starts
    first, last = starts[phase], starts["x2" if phase == "x1" else "end"]
    spaced = np.unique(np.round(np.geomspace(1, last - first, POINTS)).astype(int))
    return [first, *(first + int(n) for n in spaced)]


def one_run(folder: Path, out: Path) -> dict[str, xr.Dataset]:
    """Alignment, scores and roles of a run along its steps; kept under `out` and taken from there next time."""
    run = Trajectory.open(folder)
    names = ("scores", "roles", "trained", "exchanged")
    paths = {name: out / run_key(run) / f"{name}.h5" for name in names}
    if not all(path.exists() for path in paths.values()):
        task = dy.tasks.load(run.config)
        recipe = task.recipe()
        sites = [dy.sites.everything(recipe.model), *dy.sites.components(recipe.model)]
        contrasts, roles = dy.tasks.as_trained(task), dy.tasks.head_roles(task)
        heads = dy.sites.activations(recipe.model, "*hook_pattern", ("layer", "head"), contrasts[0].probe)

        def quantities(state: Checkpoint) -> dict[str, xr.Dataset]:
            aligned = dy.comparison.align_groups(recipe, state, contrasts, sites)
            return {
                "scores": dy.comparison.score(recipe, state, task.evaluation),
                "roles": dy.comparison.head_roles(recipe, state, roles, heads),
                "trained": dy.comparison.relations(aligned),
                "exchanged": dy.comparison.relations(aligned, "source"),
            }

        steps = sorted({*steps_of(task, "x1"), *steps_of(task, "x2")})
        found = dy.comparison.over_training({1: quantities}, run, steps, recipe, task.batch)
        for name, dataset in found.items():
            paths[name].unlink(missing_ok=True)
            dy.results.save(dataset, paths[name])
    return {name: dy.results.load(path) for name, path in paths.items()}


def panels(found: Found, phase: str, first: int, last: int) -> dict[str, xr.Dataset]:
    """The curves of a phase, [seed, step] with steps counted from its first.

    As trained: the definitions of the phase's two sets, with their own tag and value. Either tag: those of the
    aliases that X1 does not train, all of them under each tag, so that the aliases are the same. Attention: of the
    head that looks there most.
    """

    def of(name: str, run: dict[str, xr.Dataset]) -> xr.Dataset:
        return run[name].sel(step=slice(first, last))

    def over_runs(curves: list[xr.DataArray]) -> xr.DataArray:
        joined = xr.concat([c.reset_coords(drop=True) for c in curves], "seed")
        return joined.assign_coords(step=joined["step"] - first)

    def own(name: str, run: dict[str, xr.Dataset], *sets: str) -> xr.DataArray:
        whole = of(name, run)["own"].sel(site="everything")
        return whole.isel(example=np.isin(whole["set"].values, sets))

    def under(tag: int, run: dict[str, xr.Dataset]) -> xr.DataArray:
        names = ("trained", "exchanged") if tag == 0 else ("exchanged", "trained")
        parts = [own(name, run, which) for name, which in zip(names, NEW, strict=True)]
        return sum(part.sum("example") for part in parts) / sum(part.sizes["example"] for part in parts)

    def looks(role: str, run: dict[str, xr.Dataset]) -> xr.DataArray:
        return of("roles", run)["attention"].sel(measure=role).max("site")

    sets = PAIRS[phase]
    curves = {
        ACCURACY: {s: [of("scores", r)["accuracy"].sel(example=s) for r in found] for s in sets},
        ALIGNMENT: {s: [own("trained", r, s).mean("example") for r in found] for s in sets},
        TAG: {t: [under(i, r) for r in found] for i, t in enumerate(("reliable", "unreliable"))},
        ATTENTION: {role: [looks(role, r) for r in found] for role in ("to tag", "to alias")},
    }
    return {
        words: xr.Dataset({k: over_runs(v) for k, v in each.items()}, attrs={"long_name": words})
        for words, each in curves.items()
    }


def gaps(curves: dict[str, xr.Dataset]) -> dict[str, xr.DataArray]:
    """What parts: reliable − unreliable of each panel, and the attention to the tag."""
    pairs = {words: list(panel.data_vars.values()) for words, panel in curves.items() if words != ATTENTION}
    return {
        **{words: first - second for words, (first, second) in pairs.items()},
        "attention to the tag": curves[ATTENTION]["to tag"],
    }


def event(curve: xr.DataArray) -> xr.Dataset:
    """Each run's first change and its mean over runs, found and averaged on the scale of log(1 + step)."""
    logs = dy.comparison.when(curve.assign_coords(step=np.log10(1 + curve["step"])))
    steps = {name: (10 ** logs[name] - 1).clip(min=0) for name in ("at", "mean", "low", "high")}
    return logs.assign(steps)


def table(by_phase: dict[str, dict[str, xr.Dataset]]) -> list[str]:
    """What parts, from where to where, and when."""
    lines = [
        "| phase | reliable − unreliable | at the first step | after the change | change at step | runs with one |",
        "|---|---|---|---|---|---|",
    ]
    for phase, curves in by_phase.items():
        for words, curve in gaps(curves).items():
            found, n = event(curve), curve.sizes["seed"]
            later = curve.where(curve["step"] >= found["at"]).mean("step")
            after, at = "–", "–"
            if int(found["n"]) > 1:
                after = interval(later.values)
                at = "{:.0f} [{:.0f}, {:.0f}]".format(*(float(found[k]) for k in ("mean", "low", "high")))
            cells = [phase.upper(), words, interval(curve.isel(step=0).values), after, at]
            lines.append(f"| {' | '.join(cells)} | {int(found['n'])} of {n} |")
    return lines


def order(by_phase: dict[str, dict[str, xr.Dataset]]) -> list[str]:
    """Of each two events of a phase, how much later the second came: a factor, over runs that have both."""
    lines = []
    for phase, curves in by_phase.items():
        at = {words: np.log10(1 + event(curve)["at"].values) for words, curve in gaps(curves).items()}
        found = dy.comparison.order_of_events(at)
        for first, second in combinations(at, 2):
            one = found.sel(example=first, other=second)
            if int(one["n"]) > 1:
                mean, low, high = (10 ** float(one[k]) for k in ("later", "low", "high"))
                factor = f"×{mean:.2g} [{low:.2g}, {high:.2g}]"
                lines.append(f"{phase.upper()}: {first} → {second}: {factor}, {int(one['n'])} runs")
    return lines


def others(found: Found, first: int, last: int) -> str:
    """Alignment with questions about other aliases, beside that with one's own."""

    def mean(name: str) -> str:
        values = [r["trained"][name].sel(site="everything", step=slice(first, last)) for r in found]
        return interval(np.array([float(v.mean()) for v in values]))

    return f"{mean('own')} with its own, {mean('within')} within its set, {mean('across')} across sets"


def figure(by_phase: dict[str, dict[str, xr.Dataset]]) -> Figure:
    """A column for each phase, a panel for each quantity, a line where its gap changes."""
    columns = {}
    for phase, curves in by_phase.items():
        events = dict(zip(curves, map(event, gaps(curves).values()), strict=True))
        columns[phase.upper()] = [
            (panel, {"change of the gap" if words != ATTENTION else "change, to tag": events[words]})
            for words, panel in curves.items()
        ]
    return dy.plots.event_curves(columns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, one per seed; at least two")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument(
        "--readme", action="store_true", help="write the table and the figure into the README"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    found = [one_run(folder, given.out) for folder in given.runs]
    trajectories = [Trajectory.open(folder) for folder in given.runs]
    starts = dy.tasks.load(trajectories[0].config).config.phases.starts
    bounds = {"x1": (starts["x1"], starts["x2"]), "x2": (starts["x2"], starts["end"])}
    by_phase = {phase: panels(found, phase, *span) for phase, span in bounds.items()}
    seeds = ", ".join(str(run.config["seed"]) for run in trajectories)
    caption = (
        f"Seeds {seeds}; mean [95 % t interval over runs], of steps on a logarithmic scale. Alignment of a "
        f"definition over both phases: {others(found, starts['x1'], starts['end'])}. {stamp(__file__)}"
    )
    text = "\n".join([*table(by_phase), "", caption])
    print(text, *order(by_phase), sep="\n")
    drawn = figure(by_phase)
    facts = {"provenance": found[0]["trained"].attrs["provenance"]}
    dy.plots.save(drawn, given.out / "alignment.png", facts)
    if given.readme:
        dy.plots.save(drawn, README.parent / ".readme" / "alignment.png", facts)
        write("alignment", text)


if __name__ == "__main__":
    main()
