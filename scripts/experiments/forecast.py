"""Will an alias be internalised? Foretold after 20 steps of X2. About half a minute a fork, on one core.

Runs of scripts/experiments/runs.py, both forks of each seed. The analysis was written down before the seeds that
confirm were opened: docs/analyses/truth.md, question 7. Of each alias of Dt3 and Df4, 20 steps into X2: its tag,
its answers then, its definition's loss, its embedding, the alignment of its definition's gradient with that of its
questions, what one step on its definition does, and the account of those 20 steps. Logistic regression
(scikit-learn's, as it comes) foretells from them whether at least half of its untrained questions are answered
right at the end of X2. It is fitted and cross-validated by seed on those explored; with --confirm it is scored,
once, on the others.

    .venv/bin/python scripts/experiments/forecast.py ../runs-400 --workers 2 --readme
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics import results, steps
from dynamics.plots import figures
from dynamics.tasks import AliasTask
from dynamics.tasks.aliases import SetName

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.forks import asked, command_line, seeds_said
from scripts.shared.into_readme import conclude, interval, markdown, stamp

SETS: tuple[SetName, SetName] = ("Dt3", "Df4")
KNOWN_AFTER = 20
INTERNALISED = 0.5
"""Share of an alias's untrained questions answered right at the end of X2."""
MEASURE = dy.measures.centred_logit
KINDS = {
    "answers": ("accuracy now", "loss now", "correct_logit now"),
    "tag": ("reliable",),
    "definition": ("times seen", "definition loss"),
    "embedding": ("row's norm", "row's way so far"),
    "alignment": ("alignment", "alignment in embed", "alignment in attn 0"),
    "single step": ("step, stored state", "step, fresh state"),
    "account": ("account", "account in embed", "account of its definition"),
}
"""What is known of an alias, by kind; ablations leave a kind out."""

Array = npt.NDArray[np.float64]


def known(task: AliasTask, run: Trajectory) -> xr.Dataset:
    """[example] of every quantity in `KINDS`, and `internalised`, the share answered right at the end."""
    recipe, x2 = task.recipe(), task.config.phases.starts["x2"]
    start, end = run.at(x2), run.at(task.config.phases.starts["end"])
    state = steps.reach(recipe, run, x2 + KNOWN_AFTER, task.batch)
    contrasts = [
        replace(c, probe=asked.probe)
        for c, asked in zip(dy.tasks.as_trained(task, SETS), task.contrasts(SETS), strict=True)
    ]
    probes = {str(c.coords["example"]): c.probe for c in contrasts}
    batches = task.batches(x2, x2 + KNOWN_AFTER)
    own = [f"definition of {c.coords['example']}" for c in contrasts]
    return xr.Dataset(
        {
            name: ("example", np.asarray(values, dtype=np.float64))
            for name, values in {
                "internalised": _answered(task, end, probes)["accuracy now"],
                **_answered(task, state, probes),
                "reliable": [c.coords["set"] == "Dt3" for c in contrasts],
                "times seen": [sum(task.sources(b, by="integer").count(d) for b in batches) for d in own],
                "definition loss": [float(steps.gradient(recipe, state, c.base).loss) for c in contrasts],
                **_embedding(task, start, state, [int(c.coords["integer"]) for c in contrasts]),
                **_aligned(recipe, state, contrasts),
                **_stepped(recipe, state, contrasts),
                **_accounted(task, recipe, start, batches, probes, own),
            }.items()
        },
        coords={"example": list(probes), "set": ("example", [str(c.coords["set"]) for c in contrasts])},
        attrs={"provenance": results.provenance(step=state.step, measure=MEASURE.name)},
    )


def _answered(task: AliasTask, state: Checkpoint, probes: Mapping[str, dy.Batch]) -> dict[str, Array]:
    found = dy.comparison.score(task.recipe(), state, dict(probes)).sel(example=list(probes))
    return {f"{name} now": found[name].values for name in ("accuracy", "loss", "correct_logit")}


def _embedding(
    task: AliasTask, start: Checkpoint, state: Checkpoint, integers: Iterable[int]
) -> dict[str, Array]:
    tokens = [task.alias(i) for i in integers]
    rows, before = (at.parameters["embed.W_E"][tokens] for at in (state, start))
    return {
        "row's norm": rows.norm(dim=1).numpy(),
        "row's way so far": (rows - before).norm(dim=1).numpy(),
    }


def _aligned(recipe: dy.Recipe, state: Checkpoint, contrasts: Sequence[dy.Contrast]) -> dict[str, Array]:
    named = {"alignment": dy.sites.everything(recipe.model)}
    components = {site.label: site for site in dy.sites.components(recipe.model)}
    named |= {f"alignment in {label}": components[label] for label in ("embed", "attn 0")}
    found = dy.comparison.align_gradients(recipe, state, contrasts, list(named.values()), MEASURE)
    return {name: found["base"].isel(site=i).values for i, name in enumerate(named)}


def _stepped(recipe: dy.Recipe, state: Checkpoint, contrasts: Sequence[dy.Contrast]) -> dict[str, Array]:
    """What one step on an alias's definition moves its questions by, beyond what no gradient at all does."""
    found = {}
    for name, at in (("stored", state), ("fresh", state.with_fresh_optimizer())):
        step = dy.patch_gradients(recipe, at, contrasts, [dy.sites.everything(recipe.model)], MEASURE)
        found[f"step, {name} state"] = (step["base"] - step["coasted"]).values
    return found


def _accounted(
    task: AliasTask,
    recipe: dy.Recipe,
    start: Checkpoint,
    batches: Sequence[dy.Batch],
    probes: Mapping[str, dy.Batch],
    own: Sequence[str],
) -> dict[str, Array]:
    account = dy.attribute_training(
        recipe,
        start,
        batches,
        dy.sites.components(recipe.model),
        dict(probes),
        MEASURE,
        sources=partial(task.sources, by="integer"),
        every=KNOWN_AFTER,
    )
    written = account["attribution"].sum("step").sel(example=list(probes))
    by_source = written.sum("site")
    seen = set(map(str, account["source"].values))
    return {
        "account": by_source.sum("source").values,
        "account in embed": written.sel(site="embed").sum("source").values,
        "account of its definition": np.array(
            [
                float(by_source.sel(example=e, source=d)) if d in seen else 0.0
                for e, d in zip(probes, own, strict=True)
            ]
        ),
    }


# --- what it comes to -------------------------------------------------------------------------------------


def frame(found: Mapping[int, Sequence[xr.Dataset]]) -> pd.DataFrame:
    """A row for each alias of each fork, with its seed."""
    parts = [
        one.reset_coords(drop=True).to_dataframe().assign(seed=seed)
        for seed, forks in found.items()
        for one in forks
    ]
    return pd.concat(parts, ignore_index=True)


def plain() -> Any:
    """Logistic regression on standardised quantities, as scikit-learn has it."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def columns(kinds: Iterable[str]) -> list[str]:
    """The quantities of some kinds."""
    return [name for kind in kinds for name in KINDS[kind]]


def internalised(rows: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Whether each alias is internalised."""
    return (rows["internalised"] >= INTERNALISED).to_numpy().astype(np.int64)


def explored(rows: pd.DataFrame, kinds: Iterable[str]) -> list[float]:
    """The AUROC of each seed, foretold by a fit to all other seeds."""
    found = cross_val_predict(
        plain(),
        rows[columns(kinds)],
        internalised(rows),
        groups=rows["seed"],
        cv=LeaveOneGroupOut(),
        method="decision_function",
    )
    return _by_seed(rows, found)


def confirmed(fitted_on: pd.DataFrame, rows: pd.DataFrame, kinds: Iterable[str]) -> list[float]:
    """The AUROC of each seed, foretold by one fit to the seeds explored."""
    names = columns(kinds)
    model = plain().fit(fitted_on[names], internalised(fitted_on))
    return _by_seed(rows, model.decision_function(rows[names]))


def _by_seed(rows: pd.DataFrame, scores: npt.ArrayLike) -> list[float]:
    """One AUROC a seed; NaN where all of its aliases, or none, are internalised."""
    told = pd.DataFrame(
        {"seed": rows["seed"].to_numpy(), "is": internalised(rows), "score": np.asarray(scores)}
    )
    return [
        float(roc_auc_score(part["is"], part["score"])) if part["is"].nunique() == 2 else np.nan
        for _, part in told.groupby("seed")
    ]


def table(explored_rows: pd.DataFrame, confirming: pd.DataFrame | None) -> list[str]:
    """Lines: AUROC by what the forecast is made from, in the seeds explored and in those that confirm."""
    ways = {
        "everything known": list(KINDS),
        "accuracy at that step alone": None,
        **{f"without {kind}": [k for k in KINDS if k != kind] for kind in KINDS},
        **{f"{kind} alone": [kind] for kind in KINDS},
    }
    halves = [{name: scored(explored_rows, None, kinds) for name, kinds in ways.items()}]
    if confirming is not None:
        halves.append({name: scored(confirming, explored_rows, kinds) for name, kinds in ways.items()})
    everything, accuracy = list(ways)[:2]
    for half in halves:
        half["the first above the second"] = half[everything] - half[accuracy]
    lines = [
        [name, *(_cell(half[name]) for half in halves), *["–"] * (2 - len(halves))] for name in halves[0]
    ]
    return markdown(["forecast from", "explored, left-out seeds", "confirmed"], lines)


def scored(rows: pd.DataFrame, fitted_on: pd.DataFrame | None, kinds: Sequence[str] | None) -> Array:
    """The AUROC of each seed, by some kinds of knowledge, or by the accuracy at that step alone."""
    if kinds is None:
        found = _by_seed(rows, rows["accuracy now"])
    else:
        found = explored(rows, kinds) if fitted_on is None else confirmed(fitted_on, rows, kinds)
    return np.array(found)


def _cell(found: Array) -> str:
    kept = found[~np.isnan(found)]
    return f"{interval(kept)}, n = {len(kept)}"


@figures.styled
def draw(rows: pd.DataFrame, confirming: pd.DataFrame | None) -> figures.Figure:
    """Per kind of knowledge the AUROC of each seed, explored and confirming, and their means."""
    figure = figures.Figure(figsize=(7.6, 3.8))
    axes = figure.subplots()
    halves = {"seeds explored, each left out of the fit": (rows, None)}
    if confirming is not None:
        halves["seeds that confirm"] = (confirming, rows)
    ways = {"everything known": list(KINDS), "accuracy now": None, **{kind: [kind] for kind in KINDS}}
    for i, (name, given) in enumerate(halves.items()):
        for place, kinds in enumerate(ways.values()):
            found, at = scored(*given, kinds), place + 0.36 * i - 0.18 * (len(halves) - 1)
            spread = at + np.linspace(-0.1, 0.1, len(found))
            axes.plot(
                spread, found, "o", color=f"C{i}", markersize=3, alpha=0.6, label=name if not place else None
            )
            axes.plot([at - 0.14, at + 0.14], [np.nanmean(found)] * 2, color=f"C{i}", linewidth=2)
    axes.axhline(0.5, color="0.5", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(ways)), list(ways), rotation=25, ha="right")
    axes.set(ylabel="AUROC of a seed's aliases", ylim=(min(0.3, axes.get_ylim()[0]), 1))
    axes.set_title("Which aliases will be internalised, foretold 20 steps into X2")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Look up what is known, foretell, say and draw."""
    given = command_line(__doc__, "forecast", arguments)
    on_explored, on_others = asked(known, given)
    known_of = frame(on_explored)
    confirming = frame(on_others) if on_others else None
    text = [
        *table(known_of, confirming),
        "",
        f"AUROC of a seed's aliases in both forks, mean [95 % t interval over seeds]; "
        f"{seeds_said(on_explored, on_others)}; {internalised(known_of).mean():.0%} of {len(known_of)} aliases "
        f"explored are internalised. {stamp(__file__)}",
    ]
    conclude(given, "forecast", "\n".join(text), draw(known_of, confirming), {"script": Path(__file__).name})


if __name__ == "__main__":
    main()
