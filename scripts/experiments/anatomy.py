"""The anatomy of a definition's step: five questions, one table each. About 3 minutes a run, on one core.

Over several runs: (a) at which layer and position must the backward signal come from the reliable definition,
(b) is it what a matrix read or the signal that reached it, (c) does one component's gradient, exchanged
through 50 steps of X2, move Dt3 − Df4, (d) do O and V act together, (e) why does the correct logit fall after
an unreliable definition.

    .venv/bin/python scripts/experiments/anatomy.py ../runs-400/seed-4{00..11}/drawn --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import nn
from tqdm import tqdm

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics.recipe import ByNorm, Contrast, Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import beside, interval, markdown, stamp
from scripts.shared.runs import each, parser_of_runs, run_key, stored

X2_STEP = 10
"""Step within X2 of (a), (b) and (d): that of the primary analysis."""
WINDOW = 50
LATER = (0, 10, 50, 400)
"""Steps within X2 of (e)."""
HOOKS = ("hook_embed", "blocks.*.hook_resid_*", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out")
PLACES = ("embed", "resid_pre 0", "attn_out 0", "resid_mid 0", "mlp_out 0", "resid_post 0")
PLACES += ("attn_out 1", "resid_mid 1", "mlp_out 1", "resid_post 1")
MEASURES = {m.name: m for m in (dy.measures.correct_logit, dy.measures.correct_log_prob)}


def states(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """The same moment with a new optimizer and with the run's own."""
    return {"fresh": checkpoint.with_fresh_optimizer(), "stored": checkpoint}


def by_matrix(model: nn.Module) -> list[dy.sites.Site]:
    """One site per kind of matrix and layer, all heads together, each with its bias."""
    n_layers = len({name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("blocks.")})
    patterns: dict[str, list[str]] = {"W_E": ["embed.*"], "W_pos": ["pos_embed.*"]}
    for layer in range(n_layers):
        block = f"blocks.{layer}."
        patterns |= {f"W_{p} {layer}": [f"{block}attn.W_{p}", f"{block}attn.b_{p}"] for p in "QKVO"}
        patterns |= {f"W_{p} {layer}": [f"{block}mlp.W_{p}", f"{block}mlp.b_{p}"] for p in ("in", "out")}
        patterns[f"ln {layer}"] = [f"{block}ln*"]
    return dy.sites.matching(model, patterns | {"ln_final": ["ln_final.*"], "W_U": ["unembed.*"]})


def neutral(task: dy.tasks.AliasTask, contrast: Contrast) -> Contrast:
    """The unreliable definition against one with padding in the place of a tag."""
    tokens = contrast.base.tokens.clone()
    tokens[:, 0] = task.padding
    return replace(contrast, source=replace(contrast.base, tokens=tokens))


def one_run(folder: Path, out: Path) -> dict[str, xr.Dataset]:
    """All five for one run; Datasets are kept under `out` and taken from there when they exist."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    run = Trajectory.open(folder)
    task = dy.tasks.load(run.config)
    recipe = task.recipe()
    start, last = (task.config.phases.starts[name] for name in ("x2", "end"))
    later = [n for n in LATER if start + n < last]
    model, contrasts = recipe.model, task.contrasts()
    like = contrasts[0].base
    at = {n: dy.steps.reach(recipe, run, start + n, task.batch) for n in {X2_STEP, *later}}

    def both(verb, which, sites, measure=MEASURES, state=at[X2_STEP], **settings):  # type: ignore[no-untyped-def]
        parts = [verb(recipe, s, which, sites, measure, **settings) for s in states(state).values()]
        return dy.results.concat(parts, "optimizer", list(states(state)))

    signal_sites = [
        site for glob in HOOKS for site in dy.sites.activations(model, glob, by=("layer", "pos"), like=like)
    ]
    in_layer = dy.sites.at_positions(dy.sites.components(model), {"tag": 0, "alias": 1, "integer": 2})
    ov = [s for s in by_matrix(model) if s.label in ("W_O 0", "W_V 0")]
    window = [task.batch(start + n) for n in range(min(WINDOW, last - start))]
    retagged = [task.retag(batch) for batch in window]
    training = [replace(c, base=window, source=retagged) for c in contrasts]
    work = {
        "signals": lambda: both(dy.patch_signals, contrasts, signal_sites),
        "signals-forward": lambda: both(dy.patch_signals, contrasts, signal_sites, forward="source"),
        "positions": lambda: both(dy.patch_gradients, contrasts, in_layer),
        "factors": lambda: both(dy.patch_factors, contrasts, by_matrix(model)),
        "in-batch": lambda: both(
            dy.patch_gradients, task.contrasts_at(start + X2_STEP), dy.sites.components(model)
        ),
        "noise": lambda: both(dy.patch_gradients, task.noise_at(start + X2_STEP), dy.sites.components(model)),
        "window": lambda: dy.patch_window(
            recipe,
            at[0],
            training,
            dy.sites.components(model),
            {**MEASURES, "accuracy": dy.measures.accuracy},
            list(range(10, len(window) + 1, 10)),
        ),
        "interactions-gradients": lambda: both(dy.interactions, contrasts, ov),
        "interactions-updates": lambda: both(partial(dy.interactions, verb=dy.patch_updates), contrasts, ov),
        **{
            f"fall-{n}": lambda n=n: both(fall, contrasts, [dy.sites.everything(model)], state=at[n])
            for n in later
        },
    }

    def fall(recipe: Recipe, state: Checkpoint, which, sites, measure) -> xr.Dataset:  # type: ignore[no-untyped-def]
        """The tags' references; a padding tag's as `neutral`; with both norms clipped alike as `matched`."""
        found = dy.patch_gradients(recipe, state, which, sites, measure)
        padded = dy.patch_gradients(recipe, state, [neutral(task, c) for c in which], sites, measure)
        equal = dy.patch_gradients(replace(recipe, clip=ByNorm(1e-3)), state, which, sites, measure)
        return found.assign(
            neutral=padded["source"],
            matched_base=equal["base"],
            matched_source=equal["source"],
            **{f"norm_{side}": ("example", norms(recipe, state, which, side)) for side in ("base", "source")},
        )

    found = {}
    for name, compute in tqdm(work.items(), desc=str(folder), unit="question"):
        found[name] = stored(out / run_key(run) / f"{name}.h5", compute)
    return found


def norms(recipe: Recipe, state: Checkpoint, contrasts: list[Contrast], side: str) -> npt.NDArray[np.float64]:
    """‖g‖ of each contrast's base or source before clipping: [n_examples]."""
    batches = [getattr(contrast, side) for contrast in contrasts]
    gradients = [dy.steps.gradient(recipe, state, batch).gradients.values() for batch in batches]
    return np.array(
        [float(torch.nn.utils.get_total_norm([g for g in gs if g is not None])) for gs in gradients]
    )


# --- tables -----------------------------------------------------------------------------------------------

Found = list[dict[str, xr.Dataset]]


def effects(found: Found, name: str, optimizer: str = "fresh", **selected: str) -> list[float]:
    """What an exchange does to the correct logit, in each run the mean of its aliases."""
    chosen = {"measure": "correct_logit", "optimizer": optimizer, **selected}
    return [float(f[name]["effect"].sel(chosen).mean()) for f in found]


def signals_table(found: Found) -> list[str]:
    """(a): effect by hook and position."""
    rows = []
    for place in PLACES:
        tag, alias, *after = (f"{place} @{pos}" for pos in range(4))
        most = max(abs(value) for site in after for value in effects(found, "signals", site=site))
        at_alias = [
            effects(found, name, state, site=alias)
            for name, state in (("signals", "fresh"), ("signals-forward", "fresh"), ("signals", "stored"))
        ]
        shown = map(interval, (effects(found, "signals", site=tag), *at_alias))
        rows.append([place, *shown, f"{most:.0e}" if most else "0"])
    head = ["signal at", "tag", "alias", "alias, activation too", "alias, stored state", "integer and after"]
    return markdown(head, rows)


def effects_table(found: Found, name: str, labels: list[str]) -> list[str]:
    """One row per site, under that of the whole gap, source − base: with either state."""
    whole = [(f[name]["source"] - f[name]["base"]).sel(measure="correct_logit") for f in found]
    states = ("fresh", "stored")
    gaps = [interval([float(w.sel(optimizer=state).mean()) for w in whole]) for state in states]
    rows = [
        [label, *(interval(effects(found, name, state, site=label)) for state in states)] for label in labels
    ]
    return markdown(["gradient of", *states], [["everything", *gaps], *rows])


def factors_table(found: Found) -> list[str]:
    """(b): which factor carries each matrix."""
    factors = ("x", "delta", "both")
    rows = [
        [label, *(interval(effects(found, "factors", site=label, factor=f)) for f in factors)]
        for label in map(str, found[0]["factors"]["site"].values)
    ]
    return markdown(["matrix", "x", "δ", "both"], rows)


def window_table(found: Found) -> list[str]:
    """(c): Dt3 − Df4 after the window, as trained, retagged, and with one component's gradient retagged."""
    parts = [f["window"].isel(step=-1) for f in found]

    def differences(name: str, measure: str, **selected: str) -> npt.NDArray[np.float64]:
        """Mean over Dt3 less mean over Df4, of each run."""
        values = [p[name].sel(measure=measure, **selected).values for p in parts]
        reliable = [p["set"].values == "Dt3" for p in parts]
        return np.array([v[r].mean() - v[~r].mean() for v, r in zip(values, reliable, strict=True)])

    logit, right = (differences("base", m) for m in ("correct_logit", "accuracy"))
    whole = differences("source", "correct_logit") - logit
    everywhere = (differences("source", m) for m in ("correct_logit", "accuracy"))
    cases = {"nowhere (as trained)": (logit, right), "everywhere": tuple(everywhere)}
    for label in map(str, parts[0]["site"].values):
        cases[label] = tuple(differences("patched", m, site=label) for m in ("correct_logit", "accuracy"))
    rows = []
    for label, (value, accurate) in cases.items():
        part = "{:.2f} [{:.2f}, {:.2f}]".format(*map(float, dy.statistics.recovery(value - logit, whole)))
        rows.append([label, interval(value), interval(value - logit), part, interval(accurate - right)])
    head = ["gradient retagged in", "Dt3 − Df4, correct logit", "change", "share of all", "accuracy, change"]
    before, coasted = (interval(differences(n, "correct_logit")) for n in ("untouched", "coasted"))
    return [
        *markdown(head, rows),
        "",
        f"Before the window Dt3 − Df4 was {before}; coasting through it, {coasted}.",
    ]


def interactions_table(found: Found) -> list[str]:
    """(d): block 0's O and V alone, and what they do together beyond their sum."""
    rows = []
    for verb in ("gradients", "updates"):
        for state in ("fresh", "stored"):
            chosen = {"measure": "correct_logit", "optimizer": state}
            means = [f[f"interactions-{verb}"].sel(chosen).mean("example") for f in found]
            o, v = ([float(m["effect"].sel(site=f"W_{part} 0")) for m in means] for part in "OV")
            more = [float(m["interaction"].sel(site="W_O 0", other="W_V 0")) for m in means]
            whole = [float(m["source"] - m["base"]) for m in means]
            rows.append([verb, state, *map(interval, (o, v, more, whole))])
    return markdown(["exchanged", "state", "O", "V", "interaction", "whole gap"], rows)


def fall_table(found: Found) -> list[str]:
    """(e): change of the correct logit after one step of each kind."""
    rows = []
    for n in (n for n in LATER if f"fall-{n}" in found[0]):
        for state in ("fresh", "stored"):
            parts = [f[f"fall-{n}"].sel(optimizer=state) for f in found]
            means = [p.sel(measure="correct_logit").mean("example") for p in parts]
            untouched = np.array([float(m["untouched"]) for m in means])
            kinds = ("coasted", "base", "neutral", "source", "matched_base", "matched_source")
            changes = [interval(np.array([float(m[kind]) for m in means]) - untouched) for kind in kinds]
            changes.insert(4, interval([float(m["source"] - m["base"]) for m in means]))
            falls = [
                np.mean(
                    [float((p[kind] < p["untouched"]).sel(measure="correct_logit").mean()) for p in parts]
                )
                for kind in ("base", "source")
            ]
            sizes = [np.mean([float(p[f"norm_{side}"].mean()) for p in parts]) for side in ("base", "source")]
            last = ["{:.0%} / {:.0%}".format(*falls), "{:.0f} / {:.0f}".format(*sizes)]
            rows.append([str(n), state, f"{untouched.mean():.2f}", *changes, *last])
    head = [
        "X2 step",
        "state",
        "no step",
        "coasting",
        "unreliable",
        "padding",
        "reliable",
        "reliable − unreliable",
    ]
    head += [
        "unreliable, clipped to 1e-3",
        "reliable, clipped to 1e-3",
        "falls: unrel. / rel.",
        "‖g‖: unrel. / rel.",
    ]
    return markdown(head, rows)


def report(found: Found, names: list[str]) -> str:
    """The five tables, and the same contrasts inside their real batch."""
    components = [str(s) for s in found[0]["in-batch"]["site"].values]
    placed = [str(s) for s in found[0]["positions"]["site"].values]
    first = [s for s in placed if s.startswith(("embed", "pos_embed", "attn", "mlp"))]
    sections = {
        "(a) Where must the backward signal come from the reliable definition?": signals_table(found),
        "(a) Which position's contribution to a component's gradient?": effects_table(
            found, "positions", first
        ),
        "(b) Is it what a matrix read (x) or the signal that reached it (δ)?": factors_table(found),
        f"(c) {WINDOW} steps of X2 with the tags' gradients exchanged": window_table(found),
        "(d) Do O and V of block 0 interact?": interactions_table(found),
        "(e) Why can the correct logit fall after an unreliable definition?": fall_table(found),
        "The definition inside the real batch of its step": effects_table(found, "in-batch", components),
        "Noise floor: another row of that batch exchanged": effects_table(found, "noise", components),
    }
    n_aliases = ", ".join(dict.fromkeys(str(f["signals"].sizes["example"]) for f in found))
    caption = (
        f"Runs of {', '.join(names)}, {n_aliases} aliases each; X2 step {X2_STEP} where not said. "
        "Values are changes of the correct logit of an alias's own questions, except accuracies and norms: means "
        f"over {len(found)} runs, each the mean of its aliases, with Student's 95 % t interval; shares are ratios "
        f"of means with Fieller's. {stamp(__file__)}"
    )
    lines = [line for title, rows in sections.items() for line in (f"## {title}", "", *rows, "")]
    return "\n".join(["# The anatomy of a definition's step", "", caption, "", *lines])


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of_runs(__doc__, "anatomy")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(argv)
    found = each(one_run, [(folder, given.out) for folder in given.runs], given.workers)
    text = report(found, [f"seed {Trajectory.open(folder).config['seed']}" for folder in given.runs])
    pages = [given.out / "anatomy.md", *([beside("anatomy.md")] if given.readme else [])]
    for page in pages:
        page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
