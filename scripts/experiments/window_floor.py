"""How long can a component's training be told from noise? About ten minutes a seed, on one core.

Runs of scripts/experiments/runs.py, both forks of each seed; docs/analyses/truth.md, question 2. From X2's first
step the tags of its definitions are exchanged in one component's gradient, at every step (`patch_window`), and what
that does to D = Dt3 − Df4 is measured after 10 to 200 steps. Beside it two floors: the same from starts perturbed
by one part in a million, and random parameters whose first step's difference between tags is as large (the first
batch with a tag in it).

    .venv/bin/python scripts/experiments/window_floor.py ../runs-400 --workers 2 --readme
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.stats
import xarray as xr

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics import results, steps
from dynamics.plots import figures
from dynamics.sites import Site
from dynamics.tasks import AliasTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.difference import difference
from scripts.shared.forks import asked, command_line, seeds_said
from scripts.shared.into_readme import conclude, interval, markdown, stamp

AFTER = (10, 20, 50, 100, 200)
N_NOISE = 4
N_PLACEBOS = 2

Array = npt.NDArray[np.float64]


def floors(task: AliasTask, run: Trajectory, after: Sequence[int]) -> xr.Dataset:
    """Effects on D: `effect` [step, site], `noisy` [noise, step, site], `random` [placebo, step, site]."""
    recipe, start = task.recipe(), run.at(task.config.phases.starts["x2"])
    measure, probe = difference(task)
    components = dy.sites.components(recipe.model)
    batches = [task.batch(start.step + n) for n in range(max(after))]
    retagged = list(map(task.retag, batches))

    def window(at: Checkpoint, sites: Sequence[Site]) -> Array:
        found = dy.patch_window(recipe, at, [dy.Contrast(batches, retagged, probe)], sites, measure, after)
        effects: Array = found["effect"].isel(example=0).transpose("step", "site").values
        return effects

    tagged = next(n for n in range(max(after)) if (batches[n].tokens != retagged[n].tokens).any())
    delta = steps.update_difference(recipe, start, [dy.Contrast(batches[tagged], retagged[tagged], probe)])
    matched = [dy.sites.placebo(site, delta, N_PLACEBOS) for site in components]
    there = [i for i, sites in enumerate(matched) if sites]
    random = np.full((N_PLACEBOS, len(after), len(components)), np.nan)
    flat = window(start, [site for i in there for site in matched[i]])
    random[:, :, there] = np.moveaxis(flat.reshape(len(after), len(there), N_PLACEBOS), -1, 0)
    noisy = [window(dy.comparison.perturbed(start, n), components) for n in range(N_NOISE)]
    return xr.Dataset(
        {
            "effect": (("step", "site"), window(start, components)),
            "noisy": (("noise", "step", "site"), np.array(noisy)),
            "random": (("placebo", "step", "site"), random),
        },
        {"step": list(after), "site": [s.label for s in components]},
        {"provenance": results.provenance(verb="patch_window", step=start.step, measure=measure.name)},
    )


def told(found: Mapping[int, Sequence[xr.Dataset]]) -> xr.DataArray:
    """Whether a component's effect, the mean of a seed's forks, exceeds both floors: [seed, step, site].

    The floors are those of that mean: twice its standard deviation under noise, and its largest size over placebos.
    """
    seeds = []
    for forks in found.values():
        mean = xr.concat(forks, "fork").mean("fork")
        noise = 2 * mean["noisy"].std("noise", ddof=1)
        seeds.append(abs(mean["effect"]) > np.maximum(noise, abs(mean["random"]).max("placebo").fillna(0)))
    return xr.concat(seeds, "seed").assign_coords(seed=list(found))


def table(found: Mapping[int, Sequence[xr.Dataset]]) -> list[str]:
    """Lines: in how many seeds each component exceeds its floors, by length of the window, with exact intervals."""
    above = told(found)
    rows = []
    for site in map(str, above["site"].values):
        counts = [int(above.sel(site=site, step=n).sum()) for n in AFTER]
        rows.append([site, *(_share(count, above.sizes["seed"]) for count in counts)])
    return markdown(["told from noise and placebos", *(f"{n} steps" for n in AFTER)], rows)


def _share(count: int, n: int) -> str:
    low, high = scipy.stats.binomtest(count, n).proportion_ci(method="exact")
    return f"{count} of {n} [{low:.2f}, {high:.2f}]"


def table_of_effects(found: Mapping[int, Sequence[xr.Dataset]]) -> list[str]:
    """Lines: the mean effect of each component over seeds, with t intervals, by length of the window."""
    effect = xr.concat([xr.concat(forks, "fork")["effect"].mean("fork") for forks in found.values()], "seed")
    rows = [
        [site, *(interval(effect.sel(site=site, step=n).values) for n in AFTER)]
        for site in map(str, effect["site"].values)
    ]
    return markdown(["effect on D, logits", *(f"{n} steps" for n in AFTER)], rows)


def sizes(found: Mapping[int, Sequence[xr.Dataset]]) -> dict[str, xr.DataArray]:
    """How large the effect of a component of a fork is, and both floors: [seed, fork, step, site] in logits."""
    every = xr.concat([xr.concat(forks, "fork") for forks in found.values()], "seed")
    return {
        "effect of a component": abs(every["effect"]),
        "under noise (standard deviation)": every["noisy"].std("noise", ddof=1),
        "random parameters, same ‖Δ‖": abs(every["random"]).max("placebo"),
    }


def table_of_sizes(found: Mapping[int, Sequence[xr.Dataset]]) -> list[str]:
    """Lines: medians over seeds, forks and components, by length of the window."""
    medians = {
        name: size.median(("seed", "fork", "site"), skipna=True) for name, size in sizes(found).items()
    }
    rows = [[name, *(f"{float(of.sel(step=n)):.2g}" for n in AFTER)] for name, of in medians.items()]
    return markdown(["size of the effect on D, median, logits", *(f"{n} steps" for n in AFTER)], rows)


@figures.styled
def draw(found: Mapping[int, Sequence[xr.Dataset]]) -> figures.Figure:
    """By length of the window, how large effects are beside both floors: medians over seeds and components."""
    curves = sizes(found)
    figure = figures.Figure(figsize=(5.6, 3.4))
    axes = figure.subplots()
    colours = (figures.BLUE, figures.GREY, figures.ORANGE)
    for (name, values), colour in zip(curves.items(), colours, strict=True):
        after = values["step"].values
        middle = values.median(("seed", "fork", "site"), skipna=True)
        low, high = (values.quantile(q, ("seed", "fork", "site"), skipna=True) for q in (0.25, 0.75))
        axes.plot(after, middle, "o-", color=colour, label=name, markersize=4)
        axes.fill_between(after, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(after, [str(n) for n in after])
    axes.minorticks_off()
    axes.set_xlabel("steps of X2 with exchanged tags")
    axes.set_ylabel("|effect on Dt3 − Df4| (logits)")
    axes.set_title(f"Windows beside both floors, {len(found)} seeds (median, quartiles)")
    axes.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Look, say and draw."""
    given = command_line(__doc__, "window-floor", arguments)
    explored, others = asked(partial(floors, after=AFTER), given)
    text = ["Explored:", "", *table(explored)]
    if others:
        text += ["", "Confirmed:", "", *table(others)]
    every = {**explored, **others}
    text += ["", *table_of_effects(every), "", *table_of_sizes(every)]
    text += [
        "",
        f"Seeds in which a component exceeds both floors [95 % exact interval]; mean effects [95 % t interval] and "
        f"median sizes over all seeds here; {seeds_said(explored, others)}. "
        f"{stamp(__file__)}",
    ]
    conclude(given, "floor", "\n".join(text), draw(every), {"script": Path(__file__).name})


if __name__ == "__main__":
    main()
