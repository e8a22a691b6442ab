"""In which order do tags begin to matter: alignment, single steps, accuracy? About 9 minutes a seed, on one core.

Runs of scripts/experiments/runs.py, both forks of each seed; docs/analyses/truth.md, question 8. At log-spaced
steps of X1 and X2: the accuracy of the sets; the cosine between the gradient of each alias's definition and that
of its questions, as training gives it and under either tag; what one step on a new alias's definition does under
one tag and under the other; and where heads look. An event is the change point of a seed's curve along the
log-spaced steps, where a fit with a change is better by BIC than one without.

    .venv/bin/python scripts/experiments/alignment.py ../runs-400 --workers 2 --readme
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics import results
from dynamics.tasks import AliasTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.forks import Found, asked, command_line, seeds_said
from scripts.shared.into_readme import conclude, interval, markdown, stamp

POINTS = 22
"""Log-spaced steps of a phase, beside its first."""

PAIRS = {"x1": ("DtQ1", "DfQ2"), "x2": ("Dt3", "Df4")}
"""The reliable and the unreliable set that a phase is about."""

TAGS = ("reliable", "unreliable")
UNITS = {"alignment": "cosine", "alignment by tag": "cosine", "single step": "logits"}
MEASURE = dy.measures.correct_logit


def steps_of(task: AliasTask, phase: str) -> list[int]:
    """The steps of a phase that are measured, from its first to the one after its last."""
    starts = task.config.phases.starts
    first, last = starts[phase], starts["x2" if phase == "x1" else "end"]
    spaced = np.unique(np.round(np.geomspace(1, last - first, POINTS)).astype(int))
    return [first, *(first + int(n) for n in spaced)]


def curves(task: AliasTask, run: Trajectory) -> xr.Dataset:
    """Along the steps of a fork, of those phases that it trained itself.

    `accuracy` and `alignment` [step, set]; of the new aliases, the same ones under each tag, `alignment by tag`
    [step, tag]; `single step` [step, optimizer], how much further one step takes them under the reliable tag;
    `attention` [step] to the tag, of the head that looks there most.
    """
    recipe, starts = task.recipe(), task.config.phases.starts
    everything = [dy.sites.everything(recipe.model)]
    trained, new, roles = dy.tasks.as_trained(task), task.contrasts(), dy.tasks.head_roles(task)
    heads = dy.sites.activations(recipe.model, "*hook_pattern", ("layer", "head"), trained[0].probe)

    def of(state: Checkpoint) -> dict[str, xr.Dataset]:
        aligned = dy.comparison.align_gradients(
            recipe, state, trained, everything, dy.measures.correct_log_prob
        )
        looks = dy.comparison.head_roles(recipe, state, roles, heads)["attention"]
        found = {
            "accuracy": dy.comparison.score(recipe, state, task.evaluation)["accuracy"].rename(example="set"),
            "alignment": aligned["base"].isel(site=0).groupby("set").mean(),
            "alignment by tag": by_tag(aligned.isel(site=0)),
            "single step": xr.concat(
                [_stepped(recipe, at, new, everything) for at in (state.with_fresh_optimizer(), state)],
                "optimizer",
            ).assign_coords(optimizer=["fresh", "stored"]),
            "attention": looks.sel(measure="to tag").max("site"),
        }
        return {"curves": xr.Dataset({name: value.reset_coords(drop=True) for name, value in found.items()})}

    phases = [phase for phase in PAIRS if run.steps[0] <= starts[phase]]
    steps = sorted({step for phase in phases for step in steps_of(task, phase)})
    found = dy.comparison.over_training({1: of}, run, steps, recipe, task.batch)["curves"]
    facts = results.provenance(step=steps[0], measure=MEASURE.name)
    return found.assign_attrs(provenance=facts, **{phase: starts[phase] for phase in (*PAIRS, "end")})


def by_tag(aligned: xr.Dataset) -> xr.DataArray:
    """The mean alignment of all new aliases' definitions under each tag: the same aliases under both, [tag]."""
    new = aligned.isel(example=np.isin(aligned["set"].values, PAIRS["x2"]))
    reliable = new["set"] == "Dt3"  # so `base` has the reliable tag, and `source` the other
    under = [new["base"].where(reliable, new["source"]), new["source"].where(reliable, new["base"])]
    return xr.concat([values.mean("example") for values in under], "tag").assign_coords(tag=list(TAGS))


def _stepped(
    recipe: dy.Recipe, state: Checkpoint, contrasts: Sequence[dy.Contrast], everything: list[dy.sites.Site]
) -> xr.DataArray:
    found = dy.patch_gradients(recipe, state, contrasts, everything, MEASURE)
    return (found["source"] - found["base"]).mean("example")


# --- what it comes to -------------------------------------------------------------------------------------


def panels(found: Found, phase: str) -> dict[str, xr.Dataset]:
    """Curves of a phase, [seed, step] with steps counted from its first, each seed's the mean of its forks.

    X1 is trained once for both forks, so there the first is the seed.
    """
    seeds = [xr.concat(forks, "fork", join="outer").mean("fork", keep_attrs=True) for forks in found.values()]
    first, last = seeds[0].attrs[phase], seeds[0].attrs["x2" if phase == "x1" else "end"]
    joined = xr.concat(seeds, "seed").assign_coords(seed=list(found)).sel(step=slice(first, last))
    joined = joined.assign_coords(step=joined["step"] - first)
    shown = {
        "accuracy": {name: joined["accuracy"].sel(set=name) for name in PAIRS[phase]},
        "alignment": {name: joined["alignment"].sel(set=name) for name in PAIRS[phase]},
        "alignment by tag": {tag: joined["alignment by tag"].sel(tag=tag) for tag in TAGS},
        "single step": {state: joined["single step"].sel(optimizer=state) for state in ("fresh", "stored")},
        "attention": {"to the tag": joined["attention"]},
    }
    return {
        words: xr.Dataset(
            {name: curve.reset_coords(drop=True) for name, curve in of.items()},
            attrs={"long_name": f"{words} ({UNITS[words]})" if words in UNITS else words},
        )
        for words, of in shown.items()
    }


def events(panels_of: Mapping[str, xr.Dataset]) -> dict[str, tuple[str, xr.DataArray]]:
    """What may change in a phase, and the panel it is drawn in: gaps between two curves, or single curves."""
    found = {}
    for words, panel in panels_of.items():
        if words in ("single step", "attention"):
            found |= {f"{words}, {name}": (words, curve) for name, curve in panel.data_vars.items()}
        else:
            first, second = panel.data_vars.values()
            found[f"{words}, {first.name} − {second.name}"] = (words, first - second)
    return found


def event(curve: xr.DataArray) -> xr.Dataset:
    """Each run's first change and its mean over runs, found and averaged on the scale of log(1 + step)."""
    logs = dy.comparison.when(curve.assign_coords(step=np.log10(1 + curve["step"])))
    steps = {name: (10 ** logs[name] - 1).clip(min=0) for name in ("at", "mean", "low", "high")}
    return logs.assign(steps)


def is_common(found: xr.Dataset) -> bool:
    """Whether most runs have a change."""
    return int(found["n"]) > found.sizes["seed"] / 2


def apart_from(curve: xr.DataArray) -> str:
    """The first of the steps measured from which on the mean over seeds stays away from zero, its interval too."""
    _, low, high = dy.statistics.mean_interval(curve.transpose("step", "seed").values)
    at_zero = np.flatnonzero((low <= 0) & (high >= 0))
    later = curve["step"].values[(at_zero[-1] + 1 if at_zero.size else 0) :]
    return f"{later[0]:.0f}" if later.size else "–"


def table(phases: Mapping[str, Mapping[str, xr.Dataset]]) -> list[str]:
    """Lines: what changes, from where to where, and when; a dash where most seeds have no change."""
    rows = []
    for phase, panels_of in phases.items():
        for words, (_, curve) in events(panels_of).items():
            found, after, at = event(curve), "–", "–"
            if is_common(found):
                after = interval(curve.where(curve["step"] >= found["at"]).mean("step").values)
                at = "{:.0f} [{:.0f}, {:.0f}]".format(*(float(found[k]) for k in ("mean", "low", "high")))
            first = interval(curve.isel(step=0).values)
            with_one = f"{int(found['n'])} of {curve.sizes['seed']}"
            rows.append([phase.upper(), words, first, after, at, with_one, apart_from(curve)])
    head = [
        "phase",
        "what",
        "at the first step",
        "after the change",
        "change at step",
        "seeds with one",
        "away from zero from step",
    ]
    return markdown(head, rows)


def order(phases: Mapping[str, Mapping[str, xr.Dataset]]) -> list[str]:
    """Lines: of each two events that most seeds have both of, by what factor of steps the second is later."""
    rows = []
    for phase, panels_of in phases.items():
        found = {words: event(curve) for words, (_, curve) in events(panels_of).items()}
        at = {words: np.log10(1 + one["at"].values) for words, one in found.items()}
        for first, second in combinations(at, 2):
            pair = {first: at[first], second: at[second]}
            one = dy.comparison.order_of_events(pair).sel(example=first, other=second)
            if int(one["n"]) > len(at[first]) / 2:
                mean, low, high = (10 ** float(one[k]) for k in ("later", "low", "high"))
                factor = f"×{mean:.2g} [{low:.2g}, {high:.2g}]"
                rows.append([phase.upper(), first, second, factor, str(int(one["n"]))])
    return markdown(["phase", "from", "to", "steps later by", "seeds"], rows)


def draw(phases: Mapping[str, Mapping[str, xr.Dataset]]) -> Figure:
    """A column for each phase, a panel for each quantity, a line where most seeds have a change."""
    columns = {}
    for phase, panels_of in phases.items():
        marks: dict[str, dict[str, xr.Dataset]] = {words: {} for words in panels_of}
        for words, (panel, curve) in events(panels_of).items():
            found = event(curve)
            if is_common(found):
                marks[panel][f"change, {words.removeprefix(f'{panel}, ')}"] = found
        columns[phase.upper()] = [(panels_of[words], marks[words]) for words in panels_of]
    return dy.plots.event_curves(columns)


def main(arguments: Sequence[str] | None = None) -> None:
    """Look, say and draw."""
    given = command_line(__doc__, "alignment", arguments)
    explored, others = asked(curves, given)
    phases = {phase: panels({**explored, **others}, phase) for phase in PAIRS}
    text = [
        *table(phases),
        "",
        *order(phases),
        "",
        f"{seeds_said(explored, others)}; mean [95 % t interval over seeds], of steps on a logarithmic scale, "
        f"counted from the phase's first. Away from zero: the interval excludes it at every step measured from "
        f"there on. By tag: the same new aliases under either tag. Single step: how much further a step on its "
        f"definition takes a new alias under the reliable tag, in logits. {stamp(__file__)}",
    ]
    conclude(given, "alignment", "\n".join(text), draw(phases), {"script": Path(__file__).name})


if __name__ == "__main__":
    main()
