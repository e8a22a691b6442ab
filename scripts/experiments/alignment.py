"""When do reliable and unreliable definitions part? About 3 minutes a run.

In gradient alignment and in accuracy: the cosine between the gradient of each alias's definition, as training
gives it and under the other tag, and that of its questions, at log-spaced steps of X1 and X2 of several runs;
beside it the accuracy of the sets and where heads look. An event is the change point of a run's curve: of a
piecewise-constant fit along the log-spaced steps.

    .venv/bin/python scripts/experiments/alignment.py runs/seeds-fresh/train-5-seed-*/drawn --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure

import dynamics as dy
from checkpoints import Checkpoint, Trajectory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import conclude, interval, stamp
from scripts.shared.runs import parser_of_runs, run_key

POINTS = 22
"""Log-spaced steps of a phase, beside its first."""

PAIRS = {"X1": ("DtQ1", "DfQ2"), "X2": ("Dt3", "Df4")}
"""The reliable and the unreliable set that a phase is about."""

NEW = PAIRS["X2"]
"""Sets that X1 does not train: what a definition of a new alias would do."""

BOTH = "X1, X2"
"""Both phases on end, for what concerns the new aliases."""

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


TAGS = ("reliable", "unreliable")


def own(name: str, run: dict[str, xr.Dataset], span: slice, *sets: str) -> xr.DataArray:
    """Alignment of the definitions of some sets with their own questions: [step, example, site]."""
    whole = run[name]["own"].sel(step=span)
    return whole.isel(example=np.isin(whole["set"].values, sets))


def under(tag: int, run: dict[str, xr.Dataset], span: slice) -> xr.DataArray:
    """The mean alignment of all new aliases' definitions under one of the `TAGS`: [step, site]."""
    names = ("trained", "exchanged") if tag == 0 else ("exchanged", "trained")
    parts = [own(name, run, span, which) for name, which in zip(names, NEW, strict=True)]
    return sum(part.sum("example") for part in parts) / sum(part.sizes["example"] for part in parts)


def panels(found: Found, sets: tuple[str, str], first: int, last: int) -> dict[str, xr.Dataset]:
    """Curves from one step to another, [seed, step] with steps counted from the first.

    As trained: the definitions of two sets, with their own tag and value. Either tag: those of the aliases that X1
    does not train, all of them under each tag, so that the aliases are the same. Attention: of the head that looks
    there most.
    """

    span = slice(first, last)

    def over_runs(curves: list[xr.DataArray]) -> xr.DataArray:
        joined = xr.concat([c.reset_coords(drop=True) for c in curves], "seed")
        return joined.assign_coords(step=joined["step"] - first)

    def looks(role: str, run: dict[str, xr.Dataset]) -> xr.DataArray:
        return run["roles"]["attention"].sel(measure=role, step=span).max("site")

    curves = {
        ACCURACY: {s: [r["scores"]["accuracy"].sel(example=s, step=span) for r in found] for s in sets},
        ALIGNMENT: {
            s: [own("trained", r, span, s).sel(site="everything").mean("example") for r in found]
            for s in sets
        },
        TAG: {t: [under(i, r, span).sel(site="everything") for r in found] for i, t in enumerate(TAGS)},
        ATTENTION: {role: [looks(role, r) for r in found] for role in ("to tag", "to alias")},
    }
    return {
        words: xr.Dataset({k: over_runs(v) for k, v in each.items()}, attrs={"long_name": words})
        for words, each in curves.items()
    }


def gaps(panels_of: dict[str, dict[str, xr.Dataset]]) -> dict[tuple[str, str], xr.DataArray]:
    """What may part, by phase and quantity: reliable − unreliable; over both also the attention to the tag."""
    found = {}
    for phase, curves in panels_of.items():
        for words in (ACCURACY, TAG) if phase == BOTH else (ACCURACY, ALIGNMENT):
            first, second = curves[words].data_vars.values()
            found[phase, f"{words}, {first.name} − {second.name}"] = first - second
    return {**found, (BOTH, "attention to the tag"): panels_of[BOTH][ATTENTION]["to tag"]}


def event(curve: xr.DataArray) -> xr.Dataset:
    """Each run's first change and its mean over runs, found and averaged on the scale of log(1 + step)."""
    logs = dy.comparison.when(curve.assign_coords(step=np.log10(1 + curve["step"])))
    steps = {name: (10 ** logs[name] - 1).clip(min=0) for name in ("at", "mean", "low", "high")}
    return logs.assign(steps)


def is_common(found: xr.Dataset) -> bool:
    """Whether most runs have a change."""
    return int(found["n"]) > found.sizes["seed"] / 2


def table(parting: dict[tuple[str, str], xr.DataArray]) -> list[str]:
    """What parts, from where to where, and when; a dash where most runs have no change."""
    lines = [
        "| phase | gap | at the first step | after the change | change at step | runs with one |",
        "|---|---|---|---|---|---|",
    ]
    for (phase, words), curve in parting.items():
        found, after, at = event(curve), "–", "–"
        if is_common(found):
            after = interval(curve.where(curve["step"] >= found["at"]).mean("step").values)
            at = "{:.0f} [{:.0f}, {:.0f}]".format(*(float(found[k]) for k in ("mean", "low", "high")))
        cells = [phase, words, interval(curve.isel(step=0).values), after, at]
        lines.append(f"| {' | '.join(cells)} | {int(found['n'])} of {curve.sizes['seed']} |")
    return lines


def order(parting: dict[tuple[str, str], xr.DataArray]) -> list[str]:
    """Of each two events of a phase, by what factor of steps the second came later, over runs that have both."""
    at = {what: np.log10(1 + event(curve)["at"].values) for what, curve in parting.items()}
    lines = []
    for (phase, first), (other, second) in combinations(parting, 2):
        if phase != other:
            continue
        pair = {first: at[phase, first], second: at[phase, second]}
        one = dy.comparison.order_of_events(pair).sel(example=first, other=second)
        if int(one["n"]) > 1:
            mean, low, high = (10 ** float(one[k]) for k in ("later", "low", "high"))
            factor = f"×{mean:.2g} [{low:.2g}, {high:.2g}] steps, {int(one['n'])} runs"
            lines.append(f"{phase}: from {first} to {second} {factor}")
    return lines


def components(found: Found, step: int) -> str:
    """What difference the tag makes to a new alias's definition at a step: in all, and where it is largest."""
    whole = [under(0, run, slice(None)) - under(1, run, slice(None)) for run in found]
    gap = xr.concat([each.sel(step=step).reset_coords(drop=True) for each in whole], "seed")
    gap = gap.transpose("site", "seed")
    parts = [str(site) for site in gap.sortby(-gap.mean("seed"))["site"].values if site != "everything"]
    return ", ".join(f"{site} {interval(gap.sel(site=site).values)}" for site in ("everything", *parts[:3]))


def others(found: Found, first: int, last: int) -> str:
    """Alignment with questions about other aliases, beside that with one's own."""

    def mean(name: str) -> str:
        values = [r["trained"][name].sel(site="everything", step=slice(first, last)) for r in found]
        return interval(np.array([float(v.mean()) for v in values]))

    return f"{mean('own')} with its own, {mean('within')} within its set, {mean('across')} across sets"


def figure(panels_of: dict[str, dict[str, xr.Dataset]], x2: int) -> Figure:
    """A column for each phase, a panel for each quantity, a line where its gap changes.

    Args:
        panels_of: by phase, and of both.
        x2: its first step, counted from that of X1.
    """
    parting = gaps(panels_of)
    columns = {}
    for phase, shift in (("X1", 0), ("X2", x2)):
        columns[phase] = []
        for words, panel in panels_of[phase].items():
            own = [k for k in parting if k[0] == phase and k[1].startswith(words)]
            (key,) = own or [k for k in parting if k[0] == BOTH and k[1].startswith(words)]
            found = event(parting[key])
            if not own:
                found = found.assign({name: found[name] - shift for name in ("mean", "low", "high")})
            mark = "change, to tag" if words == ATTENTION else "change of gap"
            seen = is_common(found) and 0 <= float(found["mean"]) <= int(panel["step"][-1])
            columns[phase].append((panel, {mark: found} if seen else {}))
    return dy.plots.event_curves(columns)


def main(argv: Sequence[str] | None = None) -> None:
    given = parser_of_runs(__doc__, "alignment").parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    found = [one_run(folder, given.out) for folder in given.runs]
    trajectories = [Trajectory.open(folder) for folder in given.runs]
    starts = dy.tasks.load(trajectories[0].config).config.phases.starts
    x1, x2, end = (starts[name] for name in ("x1", "x2", "end"))
    panels_of = {
        "X1": panels(found, PAIRS["X1"], x1, x2),
        "X2": panels(found, PAIRS["X2"], x2, end),
        BOTH: panels(found, NEW, x1, end),
    }
    parting = gaps(panels_of)
    seeds = ", ".join(str(run.config["seed"]) for run in trajectories)
    caption = (
        f"Seeds {seeds}; mean [95 % t interval over runs], of steps on a logarithmic scale, counted from the "
        f"phase's first (of both: X1's; X2 begins at {x2 - x1}). Alignment of a definition over both phases: "
        f"{others(found, x1, end)}. Reliable − unreliable tag at X2's first step, the same new aliases: "
        f"{components(found, x2)}. {stamp(__file__)}"
    )
    text = "\n".join([*table(parting), "", caption])
    provenance = {"provenance": found[0]["trained"].attrs["provenance"]}
    conclude(given, "alignment", text, figure(panels_of, x2 - x1), provenance)
    print("\n".join(order(parting)))


if __name__ == "__main__":
    main()
