"""The anatomy of a definition's step, over several runs: five questions, one table each.

(a) at which layer and position must the backward signal come from the reliable definition, (b) is it what a
matrix read or the signal that reached it, (c) does one component's gradient, exchanged through 50 steps of X2,
move Dt3 − Df4, (d) do O and V act together, (e) why does the correct logit fall after an unreliable definition.

    .venv/bin/python scripts/anatomy.py runs/seeds-fresh/train-5-seed-*/drawn --out runs/anatomy --readme
"""

from __future__ import annotations

import argparse
import platform
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import nn
from tqdm import tqdm

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics.recipe import ByNorm, Contrast, Recipe

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- anatomy: begin -->", "<!-- anatomy: end -->"
X2_STEP = 10
"""Step within X2 of (a), (b) and (d): that of the primary analysis."""
WINDOW = 50
LATER = (0, 10, 50, 400)
"""Steps within X2 of (e)."""
HOOKS = ("hook_embed", "blocks.*.hook_resid_*", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out")
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
    start = task.config.phases.starts["x2"]
    model, contrasts = recipe.model, task.contrasts()
    like = contrasts[0].base
    at = {n: dy.steps.reach(recipe, run, start + n, task.batch) for n in {X2_STEP, *LATER}}

    def both(verb, which, sites, measure=MEASURES, state=at[X2_STEP], **settings):  # type: ignore[no-untyped-def]
        parts = [verb(recipe, s, which, sites, measure, **settings) for s in states(state).values()]
        return dy.results.concat(parts, "optimizer", list(states(state)))

    signal_sites = [
        site for glob in HOOKS for site in dy.sites.activations(model, glob, by=("layer", "pos"), like=like)
    ]
    in_layer = dy.sites.at_positions(dy.sites.components(model), {"tag": 0, "alias": 1, "integer": 2})
    ov = [s for s in by_matrix(model) if s.label in ("W_O 0", "W_V 0")]
    window = [task.batch(start + n) for n in range(WINDOW)]
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
            (10, 20, 30, 40, 50),
        ),
        "interactions-gradients": lambda: both(dy.interactions, contrasts, ov),
        "interactions-updates": lambda: both(partial(dy.interactions, verb=dy.patch_updates), contrasts, ov),
        **{
            f"fall-{n}": lambda n=n: both(fall, contrasts, [dy.sites.everything(model)], state=at[n])
            for n in LATER
        },
    }

    def fall(recipe: Recipe, state: Checkpoint, which, sites, measure) -> xr.Dataset:  # type: ignore[no-untyped-def]
        """The references of the tags' contrast; of a padding tag as `neutral`; of norms clipped alike as `matched`."""
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
        path = out / f"seed-{task.config.seed}" / f"{name}.h5"
        if not path.exists():
            dy.results.save(compute(), path)
        found[name] = dy.results.load(path)
    return found


def norms(recipe: Recipe, state: Checkpoint, contrasts: list[Contrast], side: str) -> np.ndarray:
    """‖g‖ of each contrast's base or source before clipping: [n_examples]."""
    batches = [getattr(contrast, side) for contrast in contrasts]
    gradients = [dy.steps.gradient(recipe, state, batch).gradients.values() for batch in batches]
    return np.array(
        [float(torch.nn.utils.get_total_norm([g for g in gs if g is not None])) for gs in gradients]
    )


# --- tables -----------------------------------------------------------------------------------------------


def over_runs(parts: list[xr.Dataset]) -> xr.Dataset:
    """Means over the aliases of each run, along `seed`."""
    numeric = [part.drop_vars([n for n, c in part.coords.items() if "example" in c.dims]) for part in parts]
    return dy.results.concat(
        [part.mean("example", keep_attrs=True) for part in numeric], "seed", range(len(parts))
    )


def interval(values: xr.DataArray | np.ndarray, digits: int = 2) -> str:
    """Mean with its 95 % t interval over the last axis."""
    mean, low, high = dy.statistics.mean_interval(np.asarray(values))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def shares(summary: xr.Dataset) -> str:
    """Recovery with its interval; a dash where the gap is not distinguishable from zero."""
    values = [float(summary[name]) for name in ("recovery", "recovery_low", "recovery_high")]
    return "–" if np.isnan(values[0]) else "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def per_alias(parts: list[xr.Dataset], site: str, **selected: str) -> str:
    """Effect of one site with the interval over the aliases of all runs together."""
    values = np.concatenate([part["effect"].sel(site=site, **selected).values for part in parts])
    return interval(values)


def recoveries_table(parts: list[xr.Dataset], labels: list[str], head: str, **selected: str) -> list[str]:
    """One row per site: recovery over runs with fresh and stored state, effect over aliases."""
    summary = dy.statistics.summarize(over_runs(parts)).sel(measure="correct_logit", **selected)
    lines = [
        f"| {head} | recovery, fresh [over runs] | effect, fresh [over aliases] | recovery, stored |",
        "|---|---|---|---|",
    ]
    for label in labels:
        fresh, stored = (summary.sel(site=label, optimizer=state) for state in ("fresh", "stored"))
        alone = per_alias(parts, label, optimizer="fresh", measure="correct_logit", **selected)
        lines.append(f"| {label} | {shares(fresh)} | {alone} | {shares(stored)} |")
    return lines


def signals_table(found: list[dict[str, xr.Dataset]]) -> list[str]:
    """(a): recovery by hook and position."""
    parts = [f["signals"] for f in found]
    summary = dy.statistics.summarize(over_runs(parts)).sel(measure="correct_logit")
    with_forward = dy.statistics.summarize(over_runs([f["signals-forward"] for f in found])).sel(
        measure="correct_logit"
    )
    lines = [
        "| signal at | at the tag | at the alias | at the integer and after | at the alias, activation too | at the alias, stored |",
        "|---|---|---|---|---|---|",
    ]
    places = list(dict.fromkeys(str(label).rsplit(" @", 1)[0] for label in summary["site"].values))
    for place in places:
        fresh, stored = (summary.sel(optimizer=state) for state in ("fresh", "stored"))
        after = max(abs(float(fresh["effect"].sel(site=f"{place} @{pos}"))) for pos in (2, 3))
        cells = [shares(fresh.sel(site=f"{place} @{pos}")) for pos in (0, 1)]
        cells += [f"{after:.0e}" if after else "0"]
        cells += [
            shares(with_forward.sel(site=f"{place} @1", optimizer="fresh")),
            shares(stored.sel(site=f"{place} @1")),
        ]
        lines.append(f"| {place} | {' | '.join(cells)} |")
    return lines


def factors_table(found: list[dict[str, xr.Dataset]]) -> list[str]:
    """(b): which factor carries each matrix."""
    parts = [f["factors"] for f in found]
    summary = dy.statistics.summarize(over_runs(parts)).sel(measure="correct_logit", optimizer="fresh")
    lines = [
        "| matrix | x | δ | both | x, effect [over aliases] | δ, effect [over aliases] |",
        "|---|---|---|---|---|---|",
    ]
    for label in summary["site"].values:
        cells = [shares(summary.sel(site=label, factor=factor)) for factor in ("x", "delta", "both")]
        cells += [
            per_alias(parts, label, factor=factor, optimizer="fresh", measure="correct_logit")
            for factor in ("x", "delta")
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def difference(part: xr.Dataset, values: xr.DataArray) -> xr.DataArray:
    """Mean over Dt3 less mean over Df4."""
    sets = part["set"].values
    return values.isel(example=sets == "Dt3").mean("example") - values.isel(example=sets == "Df4").mean(
        "example"
    )


def window_table(found: list[dict[str, xr.Dataset]]) -> list[str]:
    """(c): Dt3 − Df4 after the window, as trained, retagged, and with one component's gradient retagged."""
    parts = [f["window"].isel(step=-1) for f in found]
    lines = [
        "| gradient retagged | Dt3 − Df4, correct logit | change | share of the whole change | accuracy, change |",
        "|---|---|---|---|---|",
    ]

    def gaps(name: str, measure: str, **selected: str) -> np.ndarray:
        return np.array([float(difference(p, p[name].sel(measure=measure, **selected))) for p in parts])

    base, source = gaps("base", "correct_logit"), gaps("source", "correct_logit")
    accuracy = gaps("base", "accuracy")
    rows = {"nowhere (as trained)": (base, accuracy), "everywhere": (source, gaps("source", "accuracy"))}
    rows |= {
        str(label): (gaps("patched", "correct_logit", site=label), gaps("patched", "accuracy", site=label))
        for label in parts[0]["site"].values
    }
    for label, (logit, right) in rows.items():
        share, low, high = (float(v) for v in dy.statistics.recovery(logit - base, source - base))
        lines.append(
            f"| {label} | {interval(logit)} | {interval(logit - base)} | {share:.2f} [{low:.2f}, {high:.2f}] "
            f"| {interval(right - accuracy)} |"
        )
    untouched = gaps("untouched", "correct_logit")
    lines += [
        "",
        f"Before the window Dt3 − Df4 was {interval(untouched)}; coasting, {interval(gaps('coasted', 'correct_logit'))}.",
    ]
    return lines


def interactions_table(found: list[dict[str, xr.Dataset]]) -> list[str]:
    """(d): block 0's O and V alone, summed and together."""
    lines = ["| exchanged | state | O | V | interaction | all of the gap |", "|---|---|---|---|---|---|"]
    for verb in ("gradients", "updates"):
        for state in ("fresh", "stored"):
            parts = [f[f"interactions-{verb}"].sel(measure="correct_logit", optimizer=state) for f in found]
            means = [part.mean("example") for part in parts]
            cells = [
                interval(np.array([float(value(m)) for m in means]))
                for value in (
                    lambda m: m["effect"].sel(site="W_O 0"),
                    lambda m: m["effect"].sel(site="W_V 0"),
                    lambda m: m["interaction"].sel(site="W_O 0", other="W_V 0"),
                    lambda m: m["source"] - m["base"],
                )
            ]
            lines.append(f"| {verb} | {state} | {' | '.join(cells)} |")
    return lines


def fall_table(found: list[dict[str, xr.Dataset]]) -> list[str]:
    """(e): change of the correct logit after one step of each kind."""
    lines = [
        "| X2 step | state | no step | coasting | unreliable | padding | reliable | unreliable, norms alike | reliable, norms alike | ‖g‖ unreliable / reliable |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for n in LATER:
        for state in ("fresh", "stored"):
            parts = [f[f"fall-{n}"].sel(optimizer=state) for f in found]
            means = [p.sel(measure="correct_logit").mean("example") for p in parts]
            untouched = np.array([float(m["untouched"]) for m in means])
            cells = [f"{untouched.mean():.2f}"]
            for name in ("coasted", "base", "neutral", "source", "matched_base", "matched_source"):
                cells.append(interval(np.array([float(m[name]) for m in means]) - untouched))
            cells.append(
                " / ".join(
                    f"{np.mean([float(p[f'norm_{s}'].mean()) for p in parts]):.1f}"
                    for s in ("base", "source")
                )
            )
            lines.append(f"| {n} | {state} | {' | '.join(cells)} |")
    return lines


def report(found: list[dict[str, xr.Dataset]], names: list[str]) -> str:
    """The five tables."""
    components = [str(s) for s in found[0]["in-batch"]["site"].values]
    placed = [str(s) for s in found[0]["positions"]["site"].values]
    sections = {
        "(a) where the backward signal must be reliable": signals_table(found),
        "(a) which position's contribution to each component's gradient": recoveries_table(
            [f["positions"] for f in found],
            [s for s in placed if s.startswith(("embed", "pos_embed", "attn 0", "mlp 0", "attn 1"))],
            "gradient",
        ),
        "(b) what a matrix read (x) or the signal that reached it (δ)": factors_table(found),
        f"(c) {WINDOW} steps of X2 with the tags' gradients exchanged": window_table(found),
        "(d) O and V of block 0": interactions_table(found),
        "(e) why an unreliable definition can lower the correct logit": fall_table(found),
        "inside the real batch": recoveries_table([f["in-batch"] for f in found], components, "gradient"),
        "noise floor: another row of that batch exchanged": recoveries_table(
            [f["noise"] for f in found], components, "gradient"
        ),
    }
    lines = [line for title, rows in sections.items() for line in (f"**{title}**", "", *rows, "")]
    lines.append(
        f"Runs {', '.join(names)}; X2 step {X2_STEP} where not said; change of the correct logit of an alias's own "
        f"questions; 30 aliases a run; recovery is a ratio of means with Fieller's 95 % interval over {len(found)} "
        f"runs, other intervals are Student's t over runs unless over aliases. {datetime.now(UTC):%Y-%m-%d}, "
        f"{platform.machine()}, torch {torch.__version__}; `scripts/anatomy.py`."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, one per seed; at least two")
    parser.add_argument("--out", type=Path, default=Path("runs/anatomy"))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with ProcessPoolExecutor(given.workers) as pool:
        found = list(pool.map(one_run, given.runs, [given.out] * len(given.runs)))
    names = [f"seed {Trajectory.open(folder).config['seed']}" for folder in given.runs]
    text = report(found, names)
    (given.out / "anatomy.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
