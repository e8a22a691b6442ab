"""Which edges a small language's answer needs, beside random edges. About a minute a run.

For each run of a language (`dynamics fit --preset ioi`, acronyms, facts): `attribute_paths`, integrated,
scores every edge on every other prompt of the task's contrasts. The circuit is that of the highest threshold
at which, on those prompts, the circuit alone (every other edge carries what the corrupted prompt writes)
keeps 90 % of the logit difference. What is shown is measured on the other half of the prompts: how much the
circuit keeps there, and how much as many edges drawn from all, and as many drawn way by way from the tokens
to the answer.

    for task in ioi acronyms facts; do for seed in 1 2 3 4 5; do
        .venv/bin/dynamics fit --preset $task --seed $seed --out runs/languages/$task-$seed
    done; done
    .venv/bin/python scripts/experiments/circuits.py runs/languages/* --readme
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import conclude, interval, markdown, stamp
from scripts.shared.runs import TITLES, by_task, parser_of_runs, run_key, stored

MEASURE = dy.measures.logit_difference
THRESHOLDS = tuple(np.geomspace(0.1, 0.001, 15).round(5).tolist())
GOAL = 0.8
"""Share of the logit difference that a circuit should keep."""
WANTED = 0.9
"""What it must keep of it on the prompts it is found on: on others it keeps less, .04 in the runs of seed 1."""
N_SETS = 50
"""Random sets of each kind as large as the circuit, for each run."""
N_ALONG = 5
"""Random sets of each kind at every size of the figure, for each run."""

Array = npt.NDArray[np.float64]
RANDOM = {"edges": "random edges", "ways": "random paths"}
"""Kinds of random sets, and what pictures and tables call them."""


@dataclass(frozen=True)
class Found:
    """What was found in one run.

    Attributes:
        task: its name.
        seed: of the run.
        n_edges: of the whole graph.
        circuits: by threshold, from few edges to many; those that differ.
        chosen: which of them is the circuit.
        parts: Datasets by name.
    """

    task: str
    seed: int
    n_edges: int
    circuits: list[list[str]]
    chosen: int
    parts: dict[str, xr.Dataset]

    @property
    def sizes(self) -> list[int]:
        """Edges of each circuit."""
        return [len(circuit) for circuit in self.circuits]


def one_run(folder: Path, out: Path) -> Found:
    """Find and keep; Datasets are kept under `out` and taken from there when they exist."""
    run = Trajectory.open(folder)
    task = dy.tasks.load(run.config)
    recipe, contrasts = task.recipe(), task.contrasts()
    model = recipe.model
    found_on, tested = contrasts[::2], contrasts[1::2]
    edges = dy.sites.paths(model)
    draw = np.random.default_rng(run.config["seed"])
    parts: dict[str, xr.Dataset] = {}

    def part(name: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        parts[name] = stored(out / run_key(run) / f"{name}.h5", compute)
        return parts[name]

    def alone(circuits: Sequence[Sequence[str]], prompts: Sequence[dy.Contrast]) -> xr.Dataset:
        """Clean prompts, with every edge outside a circuit as the corrupted prompt writes it."""
        clean = [contrast.reversed() for contrast in prompts]
        sites = [dy.sites.outside(model, circuit, f"circuit {n}") for n, circuit in enumerate(circuits)]
        return dy.patch_paths(recipe, run.last, clean, sites, MEASURE)

    scores = part(
        "scores", lambda: dy.attribute_paths(recipe, run.last, found_on, edges, MEASURE, method="integrated")
    )
    by_size = {len(circuit): circuit for t in THRESHOLDS if (circuit := dy.circuit(scores, t))}
    circuits = [by_size[size] for size in sorted(by_size)]
    enough = kept(part("found", lambda: alone(circuits, found_on))) >= WANTED
    chosen = int(np.argmax(enough)) if enough.any() else len(circuits) - 1
    drawn = {"edges": lambda n: at_random(edges, n, draw), "ways": lambda n: by_ways(edges, n, draw)}
    part("circuits", lambda: alone(circuits, tested))
    for kind, one_of in drawn.items():
        sets = [one_of(len(circuits[chosen])) for _ in range(N_SETS)]
        part(f"random {kind}", lambda s=sets: alone(s, tested))  # type: ignore[misc]
        along = [one_of(len(circuit)) for circuit in circuits for _ in range(N_ALONG)]
        part(f"along {kind}", lambda s=along: alone(s, tested))  # type: ignore[misc]
    name, seed = run.config["task"]["name"], run.config["seed"]
    return Found(name, seed, len(edges), circuits, chosen, parts)


def at_random(edges: Sequence[dy.sites.Path], n: int, draw: np.random.Generator) -> list[str]:
    """So many edges of all."""
    return [edges[i].label for i in draw.permutation(len(edges))[:n]]


def by_ways(edges: Sequence[dy.sites.Path], n: int, draw: np.random.Generator) -> list[str]:
    """So many edges, those of random ways from the tokens to the answer; the last way may be cut short."""
    onward: dict[str, list[dy.sites.Path]] = {}
    for edge in edges:
        onward.setdefault(edge.edges[0][0], []).append(edge)
    found: dict[str, None] = {}
    while len(found) < n:
        at = "embed"
        while at != "logits":
            edge = onward[at][draw.integers(len(onward[at]))]
            found[edge.label] = None
            receiver = edge.edges[0][1]
            at = receiver.split(" ")[0] if receiver.startswith("L") else receiver
    return list(found)[:n]


def kept(dataset: xr.Dataset) -> Array:
    """Share of the difference between clean and corrupted prompts that each site leaves: [n_sites]."""
    gap = float((dataset["base"] - dataset["source"]).mean())
    values: Array = ((dataset["patched"] - dataset["source"]).mean("example") / gap).values
    return values


# --- table ------------------------------------------------------------------------------------------------


def row(name: str, runs: Sequence[Found]) -> list[str]:
    """One line of the table."""
    circuit = [kept(f.parts["circuits"])[f.chosen] for f in runs]
    random = {kind: [kept(f.parts[f"random {kind}"]) for f in runs] for kind in RANDOM}
    clean, corrupted = ([float(f.parts["circuits"][n].mean()) for f in runs] for n in ("base", "source"))
    reach = {kind: sum(int((values >= GOAL).sum()) for values in random[kind]) for kind in RANDOM}
    return [
        name,
        f"{len(runs)}",
        ", ".join(str(f.sizes[f.chosen]) for f in runs) + f" of {runs[0].n_edges}",
        f"{np.mean(clean):+.1f}, {np.mean(corrupted):+.1f}",
        interval(circuit),
        *(interval([values.mean() for values in random[kind]]) for kind in RANDOM),
        ", ".join(f"{reach[kind]} of {sum(v.size for v in random[kind])}" for kind in RANDOM),
    ]


def report(runs: Sequence[Found]) -> str:
    """The table and its caption."""
    head = [
        "task",
        "runs",
        "edges of the circuit",
        "logit difference: clean, corrupted",
        "kept by the circuit",
    ]
    head += [*(f"by {words}" for words in RANDOM.values()), f"random sets that keep {GOAL:.0%}: edges, paths"]
    tasks = by_task(runs)
    rows = [row(name, found) for name, found in tasks.items()]
    single = "; ".join(
        f"{name} " + " ".join(f"{kept(f.parts['circuits'])[f.chosen]:.2f}" for f in found)
        for name, found in tasks.items()
    )
    caption = (
        "Kept: (circuit alone − corrupted) / (clean − corrupted), a ratio of means over the prompts of a run that "
        "it was not found on; mean [95 % t interval over runs]. By run (seeds "
        f"{', '.join(dict.fromkeys(str(f.seed) for f in runs))}): {single}. {N_SETS} random sets of each kind for "
        f"each run, as large as its circuit. {stamp(__file__)}"
    )
    return "\n".join([*markdown(head, rows), "", caption])


# --- figure -----------------------------------------------------------------------------------------------


@figures.styled
def figure(runs: Sequence[Found]) -> Figure:
    """What is kept by the number of edges: by attribution, and at random; one line a run, the circuits marked."""
    tasks = by_task(runs)
    drawn = Figure(figsize=(3.3 * len(tasks), 3.4))
    panels = drawn.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    looks = {
        "random edges": (figures.GREY, "--"),
        "random paths": (figures.BLUE, ":"),
        "by attribution": (figures.VERMILLION, "-"),
    }
    for axes, (name, found) in zip(panels, tasks.items(), strict=True):
        for one in found:
            curves = {words: along(one, kind) for kind, words in RANDOM.items()}
            curves["by attribution"] = kept(one.parts["circuits"])
            for label, curve in curves.items():
                shown = {"label": label} if one is found[0] else {}
                color, line = looks[label]
                axes.plot(one.sizes, curve, color=color, linestyle=line, linewidth=1.2, **shown)
            best = curves["by attribution"][one.chosen]
            shown = {"label": "the circuit chosen on other prompts"} if one is found[0] else {}
            axes.plot(one.sizes[one.chosen], best, "o", color=figures.VERMILLION, markersize=4, **shown)
        axes.axhline(GOAL, color=figures.GREY, linewidth=0.8, zorder=1)
        axes.set(
            title=f"{TITLES.get(name, name)} ({len(found)} runs)",
            xlabel=f"edges kept, of {found[0].n_edges}",
            xlim=(0, None),
            ylim=(-0.05, 1.05),
        )
    panels[0].set_ylabel("share of the logit difference kept")
    drawn.suptitle("What a circuit keeps of the logit difference, by its number of edges; one line a run")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawn


def along(found: Found, kind: str) -> Array:
    """What random sets of each circuit's size keep, over sets."""
    means: Array = kept(found.parts[f"along {kind}"]).reshape(-1, N_ALONG).mean(1)
    return means


def main(argv: Sequence[str] | None = None) -> None:
    given = parser_of_runs(__doc__, "edges", "folders of runs; two or more seeds of each task").parse_args(
        argv
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    runs = [one_run(folder, given.out) for folder in tqdm(given.runs, desc="circuits", unit="run")]
    conclude(given, "edges", report(runs), figure(runs))


if __name__ == "__main__":
    main()
