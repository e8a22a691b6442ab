"""Does ablating the heads found hurt more than ablating random ones? About half a minute a run.

For each run of a language (`dynamics fit --preset ioi`, acronyms, facts): heads are ranked by
`patch_activations`, their outputs (hook_z, all positions) of the clean prompt put into the corrupted one, on
every other prompt of the task's contrasts. The found heads are the fewest first ones whose mean-ablation
leaves less than half of those answers right. On the other half of the prompts the found heads are ablated,
and as many others, and as many of all.

    for task in ioi acronyms facts; do for seed in 1 2 3 4 5; do
        .venv/bin/dynamics fit --preset $task --seed $seed --out runs/languages/$task-$seed
    done; done
    .venv/bin/python scripts/experiments/ablate_circuit.py runs/languages/* --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from tqdm import tqdm

import dynamics as dy
from checkpoints import Trajectory
from dynamics.plots import figures
from dynamics.plots.figures import Figure
from dynamics.sites import Site

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import conclude, interval, markdown, stamp
from scripts.shared.runs import TITLES, by_task, parser_of_runs, run_key, stored

HOOK = "blocks.*.attn.hook_z"
RANKED_BY = dy.measures.logit_margin
MEASURES = {m.name: m for m in (dy.measures.accuracy, RANKED_BY)}
VALUES = ("mean", "zero")
DESTROYED = 0.5
"""Share of right answers below which the found heads have destroyed the answer."""
N_SETS = 100
"""Random sets of as many heads as were found, for each run."""
N_ALONG = 10
"""Random sets of every size, for each run."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What was found in one run.

    Attributes:
        task: its name.
        seed: of the run.
        heads: labels, those that restore the answer most first.
        size: how many of them are the found ones.
        parts: Datasets by name: `first`, `others` and `all`, each with -mean and -zero, and `along-mean`.
    """

    task: str
    seed: int
    heads: list[str]
    size: int
    parts: dict[str, xr.Dataset]


def one_run(folder: Path, out: Path) -> Found:
    """Rank and ablate; Datasets are kept under `out` and taken from there when they exist."""
    run = Trajectory.open(folder)
    task = dy.tasks.load(run.config)
    recipe, contrasts = task.recipe(), task.contrasts()
    ranked_on, tested = contrasts[::2], contrasts[1::2]
    heads = dy.sites.activations(recipe.model, HOOK, by=("layer", "head"), like=contrasts[0].base)
    draw = np.random.default_rng(run.config["seed"])
    parts: dict[str, xr.Dataset] = {}

    def part(name: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        parts[name] = stored(out / run_key(run) / f"{name}.h5", compute)
        return parts[name]

    def ablated(sets: Sequence[Site], prompts: Sequence[dy.Contrast], values: str) -> xr.Dataset:
        """Clean prompts, with the activations of each set of heads at zero or at their mean over these prompts."""
        clean = [dy.Contrast(c.source, c.source, coords=c.coords) for c in prompts]
        return dy.patch_activations(recipe, run.last, clean, sets, MEASURES, values=values)  # type: ignore[arg-type]

    def joined(sets: Sequence[Sequence[int]]) -> list[Site]:
        """Each set of heads as one site."""
        return [dy.sites.union(recipe.model, [heads[i] for i in s], f"set {n}") for n, s in enumerate(sets)]

    ranking = part("ranking", lambda: dy.patch_activations(recipe, run.last, ranked_on, heads, RANKED_BY))
    order = np.argsort(-ranking["effect"].mean("example").values, kind="stable").tolist()
    first = [order[:size] for size in range(1, len(heads) + 1)]
    ranked = part("ranked-mean", lambda: ablated(joined(first), ranked_on, "mean"))
    right = ranked["patched"].sel(measure="accuracy").mean("example").values
    size = int(np.argmax(right < DESTROYED)) + 1 if (right < DESTROYED).any() else len(heads)
    sets = {
        "first": first,
        "others": [draw.permutation(order[size:])[:size].tolist() for _ in range(N_SETS)],
        "all": [draw.permutation(order)[:size].tolist() for _ in range(N_SETS)],
    }
    along = [draw.permutation(order)[: len(f)].tolist() for f in first for _ in range(N_ALONG)]
    for name, chosen in sets.items():
        for values in VALUES:
            part(f"{name}-{values}", lambda c=chosen, v=values: ablated(joined(c), tested, v))  # type: ignore[misc]
    part("along-mean", lambda: ablated(joined(along), tested, "mean"))
    labels = [heads[i].label.removeprefix("attn.z ") for i in order]
    return Found(run.config["task"]["name"], run.config["seed"], labels, size, parts)


# --- table ------------------------------------------------------------------------------------------------


def scored(found: Found, kind: str, values: str, measure: str) -> tuple[Array, Array, Array]:
    """On each tested prompt: as trained, without the found heads [prompt], without random ones [prompt, set]."""
    first, random = (
        found.parts[f"{kind}-{values}"].sel(measure=measure).transpose("example", "site")
        for kind in ("first", kind)
    )
    gone = first["patched"].isel(site=found.size - 1)
    return first["base"].values, gone.values, random["patched"].values


def row(runs: Sequence[Found], values: str, measure: str) -> list[str]:
    """One line of the table."""
    others, everyone = (
        [scored(found, kind, values, measure) for found in runs] for kind in ("others", "all")
    )
    before, gone, spared, any_heads = (
        [float(value.mean()) for value in each]
        for each in (
            [o[0] for o in others],
            [o[1] for o in others],
            [o[2] for o in others],
            [e[2] for e in everyone],
        )
    )
    per_prompt = np.concatenate([random.mean(1) - found for _, found, random in others])
    as_bad = [
        f"{sum(int((r.mean(0) <= f.mean()).sum()) for _, f, r in each)} of {sum(r.shape[1] for *_, r in each)}"
        for each in (others, everyone)
    ]
    return [
        runs[0].task,
        values,
        measure,
        f"{np.mean(before):.2f}",
        *(interval(each) for each in (gone, spared, any_heads)),
        interval(np.subtract(spared, gone)),
        interval(per_prompt),
        ", ".join(as_bad),
    ]


def report(runs: Sequence[Found]) -> str:
    """The table, and which heads were found."""
    head = ["task", "values", "measure", "as trained", "found heads ablated", "others ablated", "any ablated"]
    head += ["others − found [over runs]", "others − found [over prompts]", "random sets as bad: others, any"]
    rows = [
        row(found, values, measure)
        for found in by_task(runs).values()
        for measure in MEASURES
        for values in VALUES
    ]
    n_heads = len(runs[0].heads)
    circuits = [
        f"{name} ({found[0].parts['first-mean'].sizes['example']} prompts) "
        + "; ".join(f"{', '.join(f.heads[: f.size])} (seed {f.seed})" for f in found)
        for name, found in by_task(runs).items()
    ]
    caption = (
        f"Heads found, of {n_heads}: {'. '.join(circuits)}. Mean [95 % t interval over runs; in one column over "
        "the prompts of all runs]. Accuracy is the share of right answers among all words; the margin, in logits, "
        "the answer's less the best wrong one's of the contrast. Ranking and number of heads come from as many "
        f"other prompts. {N_SETS} random sets for each run, as large as the found one, of the other heads (all "
        "of them where fewer are left) and of any. "
        f"{stamp(__file__)}"
    )
    return "\n".join([*markdown(head, rows), "", caption])


# --- figure -----------------------------------------------------------------------------------------------


@figures.styled
def figure(runs: Sequence[Found]) -> Figure:
    """Right answers by the number of heads at their mean: as ranked, and at random; bands over runs."""
    tasks = by_task(runs)
    drawn = Figure(figsize=(3.3 * len(tasks), 3.4))
    panels = drawn.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, tasks.items(), strict=True):
        sizes = np.arange(len(found[0].heads) + 1)
        for label, color, curves in (
            ("heads at random", figures.BLUE, [along(f) for f in found]),
            ("heads as ranked by patching", figures.VERMILLION, [ranked(f) for f in found]),
        ):
            values = np.array(curves)
            axes.plot(sizes, values.mean(0), color=color, label=label)
            if len(found) > 1:
                _, low, high = dy.statistics.mean_interval(values, axis=0)
                axes.fill_between(sizes, low.clip(0, 1), high.clip(0, 1), color=color, alpha=0.2, linewidth=0)
        for one in found:
            axes.axvline(
                one.size,
                color=figures.GREY,
                linewidth=0.8,
                linestyle=":",
                zorder=1,
                label="number of heads found, by run" if one is found[0] else None,
            )
        axes.set(
            title=f"{TITLES.get(name, name)} ({len(found)} runs)",
            xlabel=f"heads ablated, of {sizes[-1]}",
            ylim=(0, 1.02),
            xlim=(0, sizes[-1]),
        )
        axes.set_xticks(sizes[:: max(1, len(sizes) // 4)])
    panels[0].set_ylabel("share of right answers")
    drawn.suptitle("Right answers with some heads at their mean output; bands: 95 % intervals over runs")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawn


def ranked(found: Found) -> Array:
    """Accuracy without the first 0, 1, 2 ... heads."""
    part = found.parts["first-mean"].sel(measure="accuracy").mean("example")
    return np.array([float(part["base"]), *part["patched"].values])


def along(found: Found) -> Array:
    """Accuracy without 0, 1, 2 ... random heads, over sets."""
    part = found.parts["along-mean"].sel(measure="accuracy").mean("example")
    return np.array([float(part["base"]), *part["patched"].values.reshape(-1, N_ALONG).mean(1)])


def main(argv: Sequence[str] | None = None) -> None:
    given = parser_of_runs(__doc__, "circuits", "folders of runs; two or more seeds of each task").parse_args(
        argv
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    runs = [one_run(folder, given.out) for folder in tqdm(given.runs, desc="ablating", unit="run")]
    conclude(given, "circuits", report(runs), figure(runs))


if __name__ == "__main__":
    main()
