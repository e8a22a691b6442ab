"""What a study found, in one paragraph of words and measured numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from dynamics.tasks import AliasTask

SIGNIFICANT = 0.05
"""False discovery rate at which a site is named."""

COLLAPSED = 0.5
"""Share of its late mean below which an accuracy is said to have collapsed."""


def findings(task: AliasTask, accuracy: Mapping[str, float], summary: xr.Dataset, chosen: xr.Dataset) -> str:
    """One paragraph: what training did, what the primary analysis shows, how sure it is.

    Args:
        task: the study's task.
        accuracy: from `internalisation`.
        summary: of all effects, for the comparison of optimizer states.
        chosen: the primary analysis, dims `site` alone.
    """
    return " ".join(
        [
            _trained(task, accuracy),
            _gap(task, chosen),
            _sites(chosen),
            _states(task, summary),
        ]
    )


def limits(task: AliasTask) -> str:
    """What the paragraph does not say."""
    patching = task.config.patching
    return (
        f"The primary analysis ({_named(task)}) was named in the config before anything was looked at; every "
        f"other step, optimizer state, measure and level in results/ is exploratory. The unit is the alias, so "
        f"every claim is about this run (seed {task.config.seed}); claims about such runs need many of them. "
        f"Measures computed: {', '.join(patching.measures)}."
    )


def _named(task: AliasTask) -> str:
    p = task.config.patching.primary
    return f"X2 step {p.x2_step}, {p.optimizer} optimizer state, {p.measure}, {p.level}"


def _trained(task: AliasTask, accuracy: Mapping[str, float]) -> str:
    guess = task.chance()
    return (
        f"In this run, late in X2, questions about aliases defined under the reliable tag (Dt3) are answered "
        f"{accuracy['Dt3']:.0%} correctly and those under the unreliable tag (Df4) {accuracy['Df4']:.0%}, a "
        f"difference of {accuracy['strong']:+.2f} (a uniform guess scores {guess['uniform guess']:.0%}, the best "
        f"constant answer {guess['constant answer']:.0%}); late in X1, DtQ1 − DfQ2 on untrained questions is "
        f"{accuracy['weak']:+.2f}.{_collapse(accuracy)}"
    )


def _collapse(accuracy: Mapping[str, float]) -> str:
    """A sentence where an accuracy fell far below its late mean on the way, as when training is unstable."""
    fell = [n for n in ("Dt3", "Df4") if accuracy.get(f"{n}_lowest", 1.0) < COLLAPSED * accuracy[n]]
    words = [f"{n} {accuracy[f'{n}_lowest']:.0%} at X2 step {accuracy[f'{n}_lowest_at']:.0f}" for n in fell]
    return f" Accuracy collapsed on the way ({', '.join(words)}), which lowers these means." if fell else ""


def _gap(task: AliasTask, chosen: xr.Dataset) -> str:
    gap, low, high = (float(np.ravel(chosen[name])[0]) for name in ("gap", "gap_low", "gap_high"))
    untouched, base, source = (float(np.ravel(chosen[name])[0]) for name in ("untouched", "base", "source"))
    n = int(np.ravel(chosen["n"])[0])
    clear = "distinguishable" if low > 0 or high < 0 else "not distinguishable"
    return (
        f"One reliable definition in place of an unreliable one ({_named(task)}) changes the measure on that "
        f"alias's own questions by {gap:+.3g} [{low:.3g}, {high:.3g}] (mean over {n} aliases, 95 % interval; "
        f"{untouched:.3g} without a step, {base:.3g} after the unreliable one, {source:.3g} after the reliable), "
        f"which is {clear} from zero."
    )


def _sites(chosen: xr.Dataset) -> str:
    found = chosen.isel(site=np.flatnonzero(chosen["q"].values < SIGNIFICANT))
    if not found.sizes["site"]:
        return "No site's exchange changes it at a false discovery rate of 5 %: a null result."
    order = np.argsort(-np.abs(found["effect"].values))[:3]
    named = "; ".join(_site(found.isel(site=int(i))) for i in order)
    return (
        f"{found.sizes['site']} of {chosen.sizes['site']} sites change it at a false discovery rate of 5 %, the "
        f"largest being {named}."
    )


def _site(site: xr.Dataset) -> str:
    effect = (
        f"{site['site'].item()} ({site['effect']:+.3g} [{site['effect_low']:.3g}, {site['effect_high']:.3g}]"
    )
    if np.isfinite(site["recovery"]):
        effect += f", recovery {site['recovery']:.0%}"
    return f"{effect}, q = {site['q']:.2g})"


def _states(task: AliasTask, summary: xr.Dataset) -> str:
    if not {"stored", "fresh"} <= set(summary["optimizer"].values.tolist()):
        return ""
    gaps, first = summary.isel(measure=0), task.config.phases.starts["x2"]
    words = []
    for optimizer in ("stored", "fresh"):
        here = gaps.sel(optimizer=optimizer)
        step = int(np.argmax(np.abs(here["gap"].values)))
        at = here.isel(step=step)
        words.append(
            f"with the {optimizer} optimizer state it is largest at X2 step {int(at['step']) - first}: "
            f"{at['gap']:+.3g} "
            f"[{at['gap_low']:.3g}, {at['gap_high']:.3g}]"
        )
    return (
        f"Over the replayed steps (exploratory, {summary['measure'].values[0]}), " + " and ".join(words) + "."
    )
