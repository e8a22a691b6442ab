"""Does the single step's map hold in other runs? About two minutes a seed, on one core.

Runs of scripts/experiments/runs.py, both forks of each seed; docs/analyses/truth.md, question 1. At five steps of
X2 each alias's definition takes one step, unreliable or reliable, with one component's gradient exchanged
(`patch_gradients`), from the run's optimizer state and from a fresh one. A component's recovery is the sum of its
effects over the sum of the whole exchange's, over aliases; beside it random parameters of the same ‖Δ‖ at step 10.

    .venv/bin/python scripts/experiments/single_step_map.py ../runs-400 --workers 2 --readme
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

import dynamics as dy
from checkpoints import Trajectory
from dynamics import results, steps
from dynamics.tasks import AliasTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.forks import asked, command_line, seeds_said
from scripts.shared.into_readme import conclude, interval, markdown, stamp

X2_STEPS = (0, 3, 10, 30, 100)
PRIMARY = 10
N_PLACEBOS = 20
MEASURE = dy.measures.correct_logit


def recovered(task: AliasTask, run: Trajectory) -> xr.Dataset:
    """`recovery` [step, optimizer, site], of `whole` [step, optimizer], the sum over aliases in logits.

    Steps are counted within X2. `placebo` [site]: fresh, at the primary step.
    """
    recipe, contrasts = task.recipe(), task.contrasts()
    components, x2 = dy.sites.components(recipe.model), task.config.phases.starts["x2"]
    found, wholes = np.zeros((len(X2_STEPS), 2, len(components))), np.zeros((len(X2_STEPS), 2))
    placebo = np.full(len(components), np.nan)
    for i, x2_step in enumerate(X2_STEPS):
        state = steps.reach(recipe, run, x2 + x2_step, task.batch)
        for j, at in enumerate((state.with_fresh_optimizer(), state)):
            effects = dy.patch_gradients(recipe, at, contrasts, components, MEASURE)
            whole = wholes[i, j] = float((effects["source"] - effects["base"]).sum())
            found[i, j] = effects["effect"].sum("example").values / whole
            if x2_step == PRIMARY and j == 0:
                delta = steps.update_difference(recipe, at, contrasts)
                random = [dy.sites.placebo(site, delta, N_PLACEBOS) for site in components]
                flat = [site for sites in random for site in sites]
                moved = dy.patch_updates(recipe, at, contrasts, flat, MEASURE)["effect"].sum("example").values
                ends = np.cumsum([0, *map(len, random)])
                for k in range(len(components)):
                    if random[k]:
                        placebo[k] = np.abs(moved[ends[k] : ends[k + 1]]).mean() / abs(whole)
    return xr.Dataset(
        {
            "recovery": (("step", "optimizer", "site"), found),
            "whole": (("step", "optimizer"), wholes),
            "placebo": ("site", placebo),
        },
        {"step": list(X2_STEPS), "optimizer": ["fresh", "stored"], "site": [s.label for s in components]},
        {"provenance": results.provenance(verb="patch_gradients", step=x2, measure=MEASURE.name)},
    )


def both_ways(task: AliasTask, run: Trajectory) -> xr.Dataset:
    """Fresh, primary step, logits an alias: of both directions `effect` and `mixing` [site]; `whole`."""
    recipe, components = task.recipe(), dy.sites.components(task.model())
    state = steps.reach(recipe, run, task.config.phases.starts["x2"] + PRIMARY, task.batch)
    at = state.with_fresh_optimizer()
    asked_twice = dy.both_directions(dy.patch_gradients, recipe, at, task.contrasts(), components, MEASURE)
    found = dy.statistics.antisymmetric(asked_twice)
    found["whole"] = found["source"] - found["base"]
    means = found[["effect", "mixing", "whole"]].mean("example")
    bare = means.drop_vars([name for name in means.coords if name != "site"])
    return bare.assign_attrs(provenance=results.provenance(verb="patch_gradients", step=at.step))


def table_both_ways(found: xr.Dataset) -> list[str]:
    """Lines: by component the effect of both directions, how many seeds are positive, and mixing; the whole."""
    rows = []
    for name, effect in [(site, found["effect"].sel(site=site)) for site in map(str, found["site"].values)]:
        p, above = float(dy.statistics.sign_flip_p(effect.values)), int((effect > 0).sum())
        mixing = interval(found["mixing"].sel(site=name).values)
        rows.append([name, interval(effect.values), f"{above} of {effect.size}", f"{p:.4f}", mixing])
    rows.append(["everything", interval(found["whole"].values), "", "", ""])
    head = ["logits an alias", "both directions", "seeds above 0", "p", "mixing alone"]
    return markdown(head, rows)


def by_seed(found: Mapping[int, Sequence[xr.Dataset]]) -> xr.Dataset:
    """The mean of each seed's forks, along a dim `seed`."""
    means = [xr.concat(forks, "fork").mean("fork") for forks in found.values()]
    return xr.concat(means, "seed").assign_coords(seed=list(found))


def table(explored: xr.Dataset, confirming: xr.Dataset | None) -> list[str]:
    """Lines: recovery by component at the primary step, explored and confirmed, and at the other steps."""
    rows = []
    others = [(s, o) for o in ("fresh", "stored") for s in X2_STEPS if (s, o) != (PRIMARY, "fresh")]
    for site in map(str, explored["site"].values):

        def cell(runs: xr.Dataset, step: int = PRIMARY, optimizer: str = "fresh", site: str = site) -> str:
            return interval(runs["recovery"].sel(site=site, step=step, optimizer=optimizer).values)

        confirmed = (
            ["–", "–"] if confirming is None else [cell(confirming), holds(explored, confirming, site)]
        )
        placebo = f"{float(explored['placebo'].sel(site=site).mean()):.2f}"
        rows.append(
            [site, cell(explored), *confirmed, placebo, *(cell(explored, *other) for other in others)]
        )
    head = ["recovery", f"step {PRIMARY}, fresh", "confirmed", "holds", "random, same ‖Δ‖"]
    return markdown([*head, *(f"step {step}, {optimizer}" for step, optimizer in others)], rows)


def holds(explored: xr.Dataset, confirming: xr.Dataset, site: str) -> str:
    """Whether a site's recovery is confirmed: an interval on the side of 0 that was explored; and its p."""
    first, second = (
        runs["recovery"].sel(site=site, step=PRIMARY, optimizer="fresh").values
        for runs in (explored, confirming)
    )
    bounds = np.sign(dy.statistics.mean_interval(second)[1:])
    said = "yes" if (bounds == np.sign(first.mean())).all() else "no"
    return f"{said}, p = {float(dy.statistics.sign_flip_p(second)):.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Look, and say."""
    given = command_line(__doc__, "single-step-map", arguments)
    on_explored, on_others = asked(recovered, given)
    explored = by_seed(on_explored)
    confirming = by_seed(on_others) if on_others else None
    both = [by_seed(part) for part in asked(both_ways, given, "both") if part]
    text = [
        *table(explored, confirming),
        "",
        f"Both directions at step {PRIMARY}, fresh, all seeds; looked at after the others had been opened:",
        "",
        *table_both_ways(xr.concat(both, "seed")),
        "",
        f"Mean over seeds [95 % t interval], p by sign flips over seeds; {seeds_said(on_explored, on_others)}. A "
        "recovery holds where the interval of the seeds that confirm leaves out 0, on the side explored. "
        f"{stamp(__file__)}",
    ]
    conclude(given, "single", "\n".join(text))


if __name__ == "__main__":
    main()
