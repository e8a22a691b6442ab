"""Where was a late fact written, and where is it read? About a minute a run, trained first where there is none.

In runs of the small language `facts`, seeds 300 to 311: the account of the late facts' questions over the first 64
steps in which they are stated, by component, and by statement: the fact's own, other late ones, known ones. Beside
it the recall after those steps: `patch_activations` puts what a component gives for the subject asked about, at all
positions, into the same question about another subject. Measured in the correct answer's logit less the mean logit.

    .venv/bin/python scripts/experiments/fact_account.py runs/facts-accounts --workers 2 --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import dynamics as dy
from dynamics import results, steps
from dynamics.config import FactsRun
from dynamics.plots import figures
from dynamics.plots.figures import Figure
from dynamics.sites import Site

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import conclude, interval, markdown, stamp
from scripts.shared.runs import each, parser_of_runs, stored

SEEDS = range(300, 312)
STEPS = 64
MEASURE = dy.measures.centred_logit
STATEMENTS = ("its own statement", "other late facts", "known facts", "momentum and decay")


def read_at(model: torch.nn.Module) -> list[Site]:
    """Outputs of the components that can be patched, called as `sites.components` calls the components."""
    found = [replace(dy.sites.activations(model, "hook_embed")[0], label="embed")]
    for hook, kind in (("hook_attn_out", "attn"), ("hook_mlp_out", "mlp")):
        found += [
            replace(site, label=f"{kind} {site.coords['layer']}")
            for site in dy.sites.activations(model, f"blocks.*.{hook}")
        ]
    return found


def of_run(folder: Path, config: FactsRun) -> xr.Dataset:
    """What each statement wrote at each component into each late fact, and what patching its recall brings back."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run = dy.training.fit(config, folder)
    task: Any = dy.tasks.load(run.config)
    recipe, first = task.recipe(), run.config["phases"]["learn"]["steps"]
    start = steps.reach(recipe, run, first, task.batch)
    asked = {str(c.coords["example"]): c.probe for c in task.statements()}
    parts = dy.sites.components(recipe.model)
    written = dy.attribute_training(
        recipe,
        start,
        task.batches(first, first + STEPS),
        parts,
        asked,
        MEASURE,
        sources=task.sources,
        every=STEPS,
    )
    last = steps.advance(recipe, start, first + STEPS, task.batch)
    read = dy.patch_activations(recipe, last, task.contrasts(facts=task.late), read_at(recipe.model), MEASURE)
    by_source = written["attribution"].sum("step")
    late = set(asked)

    def of_statement(fact: str) -> xr.DataArray:
        own = by_source.sel(example=fact)
        groups = {
            STATEMENTS[0]: [fact],
            STATEMENTS[1]: sorted(late - {fact}),
            STATEMENTS[2]: [s for s in map(str, own["source"].values) if s not in late | {"before", "decay"}],
            STATEMENTS[3]: ["before", "decay"],
        }
        parts = [
            own.sel(source=[s for s in names if s in own["source"]]).sum("source")
            for names in groups.values()
        ]
        return xr.concat(parts, "statement").assign_coords(statement=list(STATEMENTS))

    return xr.Dataset(
        {
            "written": xr.concat([of_statement(fact) for fact in asked], "example").reset_coords(drop=True),
            "change": (written["value"].isel(step=-1) - written["value"].isel(step=0)).reset_coords(
                drop=True
            ),
            "residual": written["residual"].sum("step").reset_coords(drop=True),
            "recovered": ((read["patched"] - read["base"]) / (read["source"] - read["base"]))
            .reset_coords(drop=True)
            .rename(site="read_site"),
        },
        attrs={"provenance": results.provenance(verb="attribute_training", step=first, measure=MEASURE.name)},
    )


def table(found: Sequence[xr.Dataset]) -> list[str]:
    """Lines: what was written at each component, by statement, and what patching it brings back."""
    rows = []
    for site in map(str, found[0]["site"].values):
        own, all_of_it = (
            [
                float(one["written"].sel(site=site, statement=list(names)).sum("statement").mean())
                for one in found
            ]
            for names in (STATEMENTS[:1], STATEMENTS)
        )
        read = "–"
        if site in found[0]["read_site"]:
            read = interval([float(one["recovered"].sel(read_site=site).median()) for one in found])
        rows.append([site, interval(own), interval(all_of_it), read])
    totals = [
        [float(one["written"].sel(statement=s).sum("site").mean()) for one in found] for s in STATEMENTS
    ]
    rows.append(
        ["all components", interval(totals[0]), interval(np.sum(totals, axis=0)), "–"],
    )
    others = "; ".join(f"{s} {interval(t)}" for s, t in zip(STATEMENTS[1:], totals[1:], strict=True))
    change = [float(one["change"].mean()) for one in found]
    return [
        *markdown(
            ["component", "written by its own statement", "written in all", "recall patched there"], rows
        ),
        "",
        f"Logits over the mean, mean over a run's late facts; change {interval(change)}. Written by {others}. "
        "Recall: the share of the answer that comes back, median over facts.",
    ]


@figures.styled
def draw(found: Sequence[xr.Dataset]) -> Figure:
    """Left what was written at each component, by statement; right what patching its output brings back."""
    read = [str(s) for s in found[0]["site"].values if s in found[0]["read_site"]]
    names = [*read, "unembed"]
    figure = Figure(figsize=(10.8, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    colours = (figures.BLUE, figures.SKY, figures.ORANGE, figures.GREY)
    for i, (statement, colour) in enumerate(zip(STATEMENTS, colours, strict=True)):
        of_runs = np.array(
            [[float(one["written"].sel(site=n, statement=statement).mean()) for n in names] for one in found]
        )
        mean, low, high = (np.asarray(v) for v in dy.statistics.mean_interval(of_runs.T))
        places = np.arange(len(names)) + 0.2 * (i - 1.5)
        left.bar(
            places,
            mean,
            0.2,
            yerr=[mean - low, high - mean],
            color=colour,
            label=statement,
            error_kw={"lw": 0.8},
        )
    recovered = np.array([[float(one["recovered"].sel(read_site=n).median()) for n in read] for one in found])
    mean, low, high = (np.asarray(v) for v in dy.statistics.mean_interval(recovered.T))
    right.bar(
        range(len(read)), mean, 0.6, yerr=[mean - low, high - mean], color=figures.GREEN, error_kw={"lw": 0.8}
    )
    left.set_ylabel("written in 64 steps (logits)")
    left.set_title(f"Where late facts were written, by statement ({len(found)} runs)")
    right.set_ylabel("share of the answer brought back")
    right.set_title(f"Where their recall is read ({len(found)} runs)")
    figure.suptitle("Mean (left) and median (right) over facts, 95 % intervals over runs")
    figure.legend(loc="outside lower left", ncols=len(STATEMENTS))
    for axes, shown in ((left, names), (right, read)):
        axes.set_xticks(range(len(shown)), shown, fontsize=7)
        axes.axhline(0, color=figures.GREY, linewidth=0.8, zorder=1)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, ask, say and draw."""
    parser = parser_of_runs(__doc__, "fact-account", "one folder, in which runs are or will be")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    given: Any = parser.parse_args(arguments)
    (folder,) = given.runs
    jobs = [(folder / f"facts-{seed}", FactsRun(seed=seed), given.out / f"seed-{seed}.h5") for seed in SEEDS]
    found = each(_kept, jobs, given.workers)
    text = [*table(found), "", f"n = {len(found)} runs, 95 % t intervals over them. {stamp(__file__)}"]
    conclude(given, "fact-account", "\n".join(text), draw(found), {"script": Path(__file__).name})


def _kept(folder: Path, config: FactsRun, path: Path) -> xr.Dataset:
    return stored(path, partial(of_run, folder, config))


if __name__ == "__main__":
    main()
