"""When does each head become causal, and which edges persist? About a minute a run.

Activation verbs over training, by `dy.sweep`, in runs of one language or more, two or more seeds each. Heads:
`patch_activations` puts every head's clean output (hook_z, all positions) into the corrupted prompt at every
stored step from 10 on; `comparison.when` says where a head's effect changes its level, and the run is the
unit. Heads have no names across runs, so those of a layer stand for each other by strength: its strongest
head at the end. Edges: `attribute_paths`, integrated (8 nodes, every other prompt), at some of those steps;
the circuit of each step (threshold 0.5 % of that step's gap) beside that of the last one.

    .venv/bin/python scripts/experiments/when_causal.py runs/languages/* --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from matplotlib.axes import Axes
from torch import Tensor, nn
from tqdm import tqdm

import dynamics as dy
from checkpoints import Trajectory
from dynamics.comparison import order_of_events, when
from dynamics.plots import figures
from dynamics.plots.figures import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import conclude, interval, markdown, stamp
from scripts.shared.runs import TITLES, parser_of_runs

MEASURES = {m.name: m for m in (dy.measures.logit_difference, dy.measures.accuracy)}
FIRST = 10
"""Steps before it are stored more densely than the logarithm asks for, and nothing is learnt there."""
THRESHOLD = 0.005
N_CIRCUITS = 6
"""Circuits of each run: at every other stored step, the last ones."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What was found in the runs of one task.

    Attributes:
        task: its name.
        heads: effects of heads [measure, seed, step, example, site].
        circuits: by seed and step, labels of edges.
        n_edges: of the whole graph.
    """

    task: str
    heads: xr.Dataset
    circuits: dict[int, dict[int, list[str]]]
    n_edges: int

    @property
    def effect(self) -> xr.DataArray:
        """Mean logit difference restored by each head: [seed, step, site]."""
        return self.heads["effect"].sel(measure="logit_difference").mean("example")

    @property
    def strongest(self) -> xr.DataArray:
        """The effect of each layer's strongest head, by its mean over the last three steps: [layer, seed, step]."""
        layers = []
        for layer in sorted(set(self.effect["layer"].values.tolist())):
            of_layer = self.effect.isel(site=np.flatnonzero(self.effect["layer"].values == layer))
            best = abs(of_layer.isel(step=slice(-3, None)).mean("step")).argmax("site")
            chosen = of_layer.isel(site=best)
            layers.append(chosen.drop_vars([n for n in chosen.coords if n not in ("seed", "step")]))
        return xr.concat(layers, "layer").transpose("layer", "seed", "step")

    @property
    def gap(self) -> xr.DataArray:
        """Mean logit difference between clean and corrupted prompts: [seed, step]."""
        return (self.heads["source"] - self.heads["base"]).sel(measure="logit_difference").mean("example")

    @property
    def accuracy(self) -> xr.DataArray:
        """Of clean prompts: [seed, step]."""
        return self.heads["source"].sel(measure="accuracy").mean("example")


def heads_of(model: nn.Module, like: Tensor) -> list[dy.sites.Site]:
    """Every head's output."""
    return dy.sites.activations(model, "blocks.*.attn.hook_z", by=("layer", "head"), like=like)


def one_task(runs: Sequence[Trajectory], out: Path) -> Found:
    """Both sweeps; what is computed is kept under `out`."""
    task = dy.tasks.load(runs[0].config)
    like = torch.zeros_like(task.contrasts()[0].base.tokens)  # a token of every run's own vocabulary
    end = task.config.phases.starts.get("late", runs[0].steps[-1])
    common = set.intersection(*(set(run.steps) for run in runs))
    steps = sorted(step for step in common if FIRST <= step <= end)

    def prompts(task: dy.tasks.Task, step: int) -> list[dy.Contrast]:
        return list(task.contrasts())

    def every_other(task: dy.tasks.Task, step: int) -> list[dy.Contrast]:
        return list(task.contrasts())[::2]

    heads = dy.sweep(
        dy.patch_activations, runs, steps, prompts, partial(heads_of, like=like), MEASURES, out=out
    )
    edges = dy.sweep(
        partial(dy.attribute_paths, method="integrated", max_nodes=8),
        runs,
        steps[::-2][:N_CIRCUITS][::-1],
        every_other,
        dy.sites.paths,
        dy.measures.logit_difference,
        out=out,
    )
    circuits = {
        seed: {
            step: dy.circuit(edges.sel(seed=seed, step=step), THRESHOLD)
            for step in edges["step"].values.tolist()
        }
        for seed in edges["seed"].values.tolist()
    }
    return Found(runs[0].config["task"]["name"], heads, circuits, edges.sizes["site"])


# --- tables -----------------------------------------------------------------------------------------------


def events(found: Found) -> list[list[str]]:
    """A line for each layer's strongest head: when, how much, and how long before the whole difference is there."""
    changes, opened, answered = (when(curve) for curve in (found.strongest, found.gap, found.accuracy))
    rows = []
    for layer in range(found.strongest.sizes["layer"]):
        at = changes["at"].isel(layer=layer).values
        order = order_of_events({"head": at, "gap": opened["at"].values})
        after = order.sel(example="head", other="gap")
        later, low, high = (float(after[key]) for key in ("later", "low", "high"))
        share = (found.strongest.isel(layer=layer) / found.gap).isel(step=-1).values
        rows.append(
            [
                found.task,
                f"{layer}",
                interval(share),
                " ".join(f"{step:.0f}" if np.isfinite(step) else "–" for step in at),
                f"{later:+.0f} [{low:+.0f}, {high:+.0f}]",
                " ".join(f"{step:.0f}" for step in opened["at"].values),
                " ".join(f"{step:.0f}" for step in answered["at"].values),
            ]
        )
    return rows


def persistence(found: Found) -> list[list[str]]:
    """A line for each step's circuit beside the last one's."""
    steps = list(next(iter(found.circuits.values())))
    rows = []
    for step in steps[:-1]:
        now, last = ([set(c[s]) for c in found.circuits.values()] for s in (step, steps[-1]))
        formed = [(a, b) for a, b in zip(now, last, strict=True) if a]
        there = [len(a & b) / len(a) for a, b in formed]
        stays = [
            len(set.intersection(*(set(c[s]) for s in steps if s >= step))) for c in found.circuits.values()
        ]
        rows.append(
            [
                found.task,
                f"{step}",
                " ".join(str(len(a)) for a in now),
                interval(there),
                f"{np.mean([len(b) / found.n_edges for _, b in formed]):.2f}",
                interval([len(a & b) / len(b) for a, b in formed]),
                " ".join(map(str, stays)),
            ]
        )
    return rows


def report(found: Sequence[Found]) -> str:
    """Both tables and their caption."""
    heads = ["task", "layer", "its strongest head's share of the gap at the end", "causal from step, by seed"]
    heads += ["whole gap later by", "gap from step, by seed", "right answers from step, by seed"]
    edges = ["task", "step", "edges of its circuit, by seed", "of these in the last circuit", "by chance"]
    edges += ["of the last circuit already there", "in every circuit from here on, by seed"]
    caption = (
        "Change points: one change of level, by BIC, over steps evenly spaced on the logarithm; – where there is "
        "none. Mean [95 % t interval over runs], seeds "
        + ", ".join(str(seed) for seed in found[0].circuits)
        + ". Gap: what the logit difference of clean prompts has over that of corrupted ones. By chance: as large "
        "a random set's share of edges in the last circuit. " + stamp(__file__)
    )
    first, second = (
        "\n".join(markdown(head, [row for one in found for row in rows(one)]))
        for head, rows in ((heads, events), (edges, persistence))
    )
    return f"{first}\n\n{second}\n\n{caption}"


# --- figure -----------------------------------------------------------------------------------------------


@figures.styled
def figure(found: Sequence[Found]) -> Figure:
    """Above, each layer's strongest head over training beside the answers; below, edges of the last circuit."""
    drawn = Figure(figsize=(3.5 * len(found), 5.4))
    grid = drawn.subplots(2, len(found), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
    colors = (figures.GREEN, figures.BLUE, figures.PURPLE, figures.VERMILLION)
    for (above, below), one in zip(grid.T, found, strict=True):
        curves = one.strongest / one.gap.isel(step=-1)
        steps = curves["step"].values
        for layer, color in zip(range(curves.sizes["layer"]), colors * curves.sizes["layer"], strict=False):
            band(above, steps, curves.isel(layer=layer), color, f"strongest head of layer {layer}")
        band(above, steps, one.accuracy, figures.BLACK, "share of right answers")
        by_step = list(next(iter(one.circuits.values())))
        last = [set(circuits[by_step[-1]]) for circuits in one.circuits.values()]
        shares = [
            [len(set(circuits[s]) & end) / len(end) for s in by_step]
            for circuits, end in zip(one.circuits.values(), last, strict=True)
        ]
        sizes = [[len(circuits[s]) / one.n_edges for s in by_step] for circuits in one.circuits.values()]
        band(
            below,
            np.array(by_step),
            np.array(shares),
            figures.SKY,
            "the last circuit's edges already there",
        )
        band(
            below,
            np.array(by_step),
            np.array(sizes),
            figures.GREY,
            "by chance: the circuit's share of all edges",
        )
        runs = len(one.circuits)
        above.set(title=f"{TITLES.get(one.task, one.task)} ({runs} runs)", xscale="log", ylim=(-0.05, 1.02))
        below.set(xlabel="training step", ylim=(0, 1.02))
    grid[0, 0].set_ylabel("share of the final gap restored;\nshare of right answers")
    grid[1, 0].set_ylabel("share of edges")
    drawn.suptitle(
        "When heads become causal, and when the last circuit's edges are there; 95 % intervals over runs"
    )
    handles = [both for axes in grid[:, 0] for both in zip(*axes.get_legend_handles_labels(), strict=True)]
    drawn.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=3)
    return drawn


def band(axes: Axes, across: Array, curves: npt.ArrayLike, color: str, label: str) -> None:
    """Mean over runs [seed, step] with its 95 % t interval."""
    mean, low, high = dy.statistics.mean_interval(np.asarray(curves), axis=0)
    axes.plot(across, mean, color=color, label=label)
    axes.fill_between(across, low, high, color=color, alpha=0.15, linewidth=0)


def main(argv: Sequence[str] | None = None) -> None:
    given = parser_of_runs(__doc__, "causal", "folders of runs; two or more seeds of each task").parse_args(
        argv
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    runs = sorted((Trajectory.open(folder) for folder in given.runs), key=lambda run: int(run.config["seed"]))
    tasks = dict.fromkeys(str(run.config["task"]["name"]) for run in runs)
    found = [
        one_task([run for run in runs if run.config["task"]["name"] == name], given.out)
        for name in tqdm(tasks, desc="tasks", unit="task")
    ]
    conclude(given, "causal", report(found), figure(found))


if __name__ == "__main__":
    main()
