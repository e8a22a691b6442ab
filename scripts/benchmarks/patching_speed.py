"""The verbs beside the seed's loop: time, memory, how the cost grows. About half an hour on 2 cores.

    .venv/bin/python scripts/benchmarks/patching_speed.py --readme

Each row interleaves the loop of `seed_loop.py` and the verb; both take identical batches from the same
checkpoint, a few steps into training, so results must agree. The seed's size is timed on some of the sites,
evenly spread, as its loop is the same for each.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
import yaml
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.config import StudyConfig, ToyConfig
from dynamics.plots import figures

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.benchmarks import seed_loop
from scripts.shared import runs
from scripts.shared.into_readme import beside, conclude, stamp

PRESETS = {"toy": "default", "seed": "seed"}
SIZES = {"toy": "toy 2 x 128", "seed": "seed's size 6 x 1024"}
WARM_STEPS = 5
LOOPED_SITES = 12
"""Sites that the seed's loop takes at the seed's size."""


@dataclass(frozen=True)
class Bench:
    """A recipe, a state with moments, contrasts."""

    recipe: dy.Recipe
    state: Checkpoint
    contrasts: list[dy.Contrast]
    measure: Callable[[Any, Any], torch.Tensor] = dy.measures.correct_logit

    @classmethod
    def of(cls, config: StudyConfig, device: str = "cpu") -> Bench:
        """The toy of a config, warmed up by a few steps of X2."""
        task = dy.tasks.AliasTask(config)
        recipe = task.recipe()
        recipe.model.to(device)
        optimizer = recipe.optimizer(recipe.model.parameters())
        first = config.phases.starts["x2"]
        start = Checkpoint.capture(recipe.model, optimizer, recipe.scheduler(optimizer), first)
        state = dy.steps.advance(recipe, start, first + WARM_STEPS, lambda step: task.batch(step).to(device))
        return cls(recipe, state, [contrast.to(device) for contrast in task.contrasts()])


def config_of(size: str) -> StudyConfig:
    """The config of a preset."""
    text = (files("dynamics") / "presets" / f"{PRESETS[size]}.yaml").read_text()
    return StudyConfig.from_dict(yaml.safe_load(text) or {})


@dataclass(frozen=True)
class Row:
    """One line of the table: a verb from a state, and what it takes."""

    name: str
    verb: str
    state: Checkpoint
    contrasts: list[dy.Contrast]
    sites: list[dy.Site]
    goals: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)


def rows(bench: Bench, size: str) -> list[Row]:
    """What is compared."""
    model, first, warm = bench.recipe.model, bench.contrasts[:1], bench.state
    matrices = dy.sites.matrices(model)
    every = [*matrices, *dy.sites.neurons(model), *dy.sites.rows(model, "embed.W_E")]
    signals = dy.sites.activations(model, "blocks.*.attn.hook_z", ("layer", "head", "pos"), first[0].base)
    fresh = warm.with_fresh_optimizer()
    fast, first_order = {"toy": 150, "seed": 150}, {"method": "first_order"}
    found = [
        Row(
            "`patch_gradients`, stored AdamW",
            "patch_gradients",
            warm,
            first,
            matrices,
            {"toy": 8, "seed": 4},
        ),
        Row(
            "`patch_gradients`, fresh AdamW",
            "patch_gradients",
            fresh,
            first,
            matrices,
            {"toy": 7, "seed": 4},
        ),
        Row("`patch_updates`", "patch_updates", warm, first, matrices, {"toy": 9, "seed": 7}),
        Row(
            "`attribute_step`, first order, all sites",
            "attribute_step",
            warm,
            first,
            every,
            fast,
            first_order,
        ),
        Row("`attribute_step`, integrated, all sites", "attribute_step", warm, first, every, fast),
        Row(
            "`patch_signals`, layer x head x position",
            "patch_signals",
            warm,
            first,
            signals,
            {"toy": 9, "seed": 4},
        ),
    ]
    if size == "toy":
        name = "`patch_gradients`, 30 contrasts"
        found.append(Row(name, "patch_gradients", warm, bench.contrasts[:30], matrices, {"toy": 9}))
    return found


def ours(bench: Bench, row: Row) -> xr.Dataset:
    """The verb."""
    verb = getattr(dy, row.verb)
    return verb(bench.recipe, row.state, row.contrasts, row.sites, bench.measure, **row.settings)


def looped(bench: Bench, row: Row, sites: list[dy.Site]) -> list[float]:
    """The seed's way; for `attribute_step`, which estimates them, exact exchanges of updates."""
    verb = "patch_updates" if row.verb == "attribute_step" else row.verb
    return list(seed_loop.patched(verb, bench.recipe, row.state, row.contrasts, sites, bench.measure))


def clock() -> float:
    """Seconds: those of the processor where one thread computes, which nothing else on the machine lengthens."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it; a GPU's queue is empty before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = clock()
    found = function()
    wait()
    return clock() - begin, found


def every(row: Row, size: str) -> int:
    """How far apart the sites stand that the loop takes."""
    return max(1, len(row.sites) // LOOPED_SITES) if size == "seed" or len(row.sites) > 100 else 1


def compared(bench: Bench, row: Row, size: str, repeats: int) -> dict[str, Any]:
    """Median seconds of both ways, and how far their results differ."""
    apart = every(row, size)
    picked = row.sites[::apart]
    ours(bench, replace(row, contrasts=row.contrasts[:1]))  # warm up
    on_gpu = next(bench.recipe.model.parameters()).is_cuda
    peak = {"gpu_mb": gpu_peak(lambda: ours(bench, row))} if on_gpu else {}
    pairs = [
        (timed(lambda: ours(bench, row)), timed(lambda: looped(bench, row, picked))) for _ in range(repeats)
    ]
    seconds = [statistics.median(pair[i][0] for pair in pairs) for i in (0, 1)]
    found = pairs[0][0][1]
    name = "attribution" if row.verb == "attribute_step" else "patched"
    theirs = np.array(pairs[0][1][1]).reshape(len(row.contrasts), len(picked))
    values = found[name].values[:, ::apart]
    if row.verb == "attribute_step":
        theirs = theirs - found["base"].values[:, None]
        agreement = float(stats.spearmanr(values.ravel(), theirs.ravel()).statistic)
    else:
        agreement = float(np.max(np.abs(values - theirs) / np.maximum(1, np.abs(theirs))))
    n = len(row.sites) * len(row.contrasts)
    return {
        "row": row.name,
        "sites": n,
        "ours_ms": 1e3 * seconds[0] / n,
        "loop_ms": 1e3 * seconds[1] / (len(picked) * len(row.contrasts)),
        "goal": row.goals[size],
        "agreement": agreement,
        **peak,
    }


def gpu_peak(function: Callable[[], Any]) -> float:
    """Megabytes allocated on the GPU at the peak of a call beyond what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


MEMORY_GOALS = {"toy": lambda model: 512, "seed": lambda model: 4 * model}
"""Megabytes that a sweep of matrices may need, from those of the model."""

MEMORY = {"as it is": None, "`max_memory(2**27)`": 2**27}
"""What stacks may take; None for the default."""

SWEEPS, OTHERS = ("patch_gradients", "patch_updates"), ("patch_signals", "attribute_step")
"""Verbs whose memory has a goal, and others."""


def extra_memory(size: str, verb: str, n_bytes: int | None) -> float:
    """Megabytes that a verb needs at its peak beyond the model and the checkpoint; in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, size, verb, n_bytes).result()


def _peak(size: str, verb: str, n_bytes: int | None) -> float:
    torch.set_num_threads(1)

    def row_of(size: str) -> tuple[Bench, Row]:
        bench = Bench.of(config_of(size))
        return bench, next(row for row in rows(bench, size) if row.verb == verb)

    ours(*row_of("toy"))  # the code itself is loaded
    bench, row = row_of(size)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with dy.max_memory(n_bytes) if n_bytes else nullcontext():
        ours(bench, row)
    return _resident("VmHWM") - before


def _resident(which: str) -> float:
    """Megabytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def rate_of(rows: int, width: int, n: int, device: str = "cpu") -> float:
    """Operations a second of n products [rows, width] x [width, width] at once, at best."""
    a, b = torch.randn(n, rows, width, device=device), torch.randn(n, width, width, device=device)
    return 2 * n * rows * width**2 / min(timed(lambda: a @ b)[0] for _ in range(20))


def floor_ms(bench: Bench, device: str) -> tuple[float, float]:
    """Milliseconds that the matrix products of the measure's forward pass take at this machine's best rate, and
    that rate in GFLOP/s."""
    rate = rate_of(1024, 1024, 1, device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dy.measures.correct_logit(bench.recipe.model, bench.contrasts[0].probe)
    return 1e3 * counter.get_total_flops() / rate, rate / 1e9


def measure(size: str, repeats: int, threads: int, device: str = "cpu") -> dict[str, Any]:
    """All rows of one size."""
    torch.set_num_threads(threads)
    bench = Bench.of(config_of(size), device)
    floor, rate = floor_ms(bench, device)
    parameters = sum(p.numel() for p in bench.recipe.model.parameters())
    found = [
        compared(bench, row, size, repeats)
        for row in tqdm(rows(bench, size), desc=f"{size}, {device}, {threads} threads")
    ]
    return {
        "size": size,
        "device": f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else "GPU",
        "parameters": parameters,
        "floor_ms": floor,
        "gflops": rate,
        "rows": found,
        "repeats": repeats,
    }


def scaling(repeats: int) -> dict[str, Any]:
    """Seconds of the verbs against numbers of sites, contrasts and parameters."""
    torch.set_num_threads(1)
    bench = Bench.of(config_of("toy"))
    matrices = dy.sites.matrices(bench.recipe.model)
    benches = [
        Bench.of(replace(config_of("toy"), model=ToyConfig(d_model=d, d_head=d // 4, d_mlp=2 * d)))
        for d in (32, 64, 128, 256, 512)
    ]
    found: dict[str, Any] = {}
    for verb in ("patch_gradients", "patch_updates", "attribute_step"):
        row = Row(verb, verb, bench.state, bench.contrasts[:1], matrices, {})
        curves = {
            "sites": [(n, bench, replace(row, sites=matrices[:n])) for n in (1, 3, 6, 12, 24, 46)],
            "contrasts": [(n, bench, replace(row, contrasts=bench.contrasts[:n])) for n in (1, 3, 10, 30)],
            "parameters": [
                (
                    sum(p.numel() for p in b.recipe.model.parameters()),
                    b,
                    Row(verb, verb, b.state, b.contrasts[:1], dy.sites.matrices(b.recipe.model), {}),
                )
                for b in benches
            ],
        }
        for axis, points in curves.items():
            seconds = [
                statistics.median(timed(lambda b=b, r=r: ours(b, r))[0] for _ in range(repeats))
                for _, b, r in points
            ]
            numbers = [n for n, _, _ in points]
            upper = slice(len(numbers) // 2 - 1, None)
            slope = np.polyfit(np.log(numbers[upper]), np.log(seconds[upper]), 1)[0]
            found.setdefault(axis, {})[verb] = {"n": numbers, "seconds": seconds, "slope": float(slope)}
    return found


@figures.styled
def picture(found: dict[str, Any], path: Path) -> None:
    """One panel for each axis, logarithmic both ways."""
    figure = figures.Figure(figsize=(10, 3.8))
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (axis, verbs) in zip(axes, found.items(), strict=True):
        for (verb, curve), mark in zip(verbs.items(), "os^", strict=False):
            ax.loglog(curve["n"], 1e3 * np.array(curve["seconds"]), marker=mark, label=verb)
        slopes = ", ".join(f"{curve['slope']:.2f}" for curve in verbs.values())
        ax.set(title=f"log-log slopes {slopes}", xlabel=f"number of {axis}")
    axes[0].set_ylabel("one call (ms)")
    figure.suptitle("How the time of one call grows with sites, contrasts and parameters")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    dy.plots.save(figure, path)


def gpu_memory(row: dict[str, Any]) -> str:
    """What a verb needs on the GPU beyond model and checkpoint, where one was measured."""
    return f"; {row['gpu_mb']:.0f} MB" if "gpu_mb" in row else ""


def table(
    found: list[dict[str, Any]],
    memory: dict[str, dict[str, dict[str, float]]],
    slopes: dict[str, Any],
) -> str:
    """Ratios by size and threads, goals beside them."""
    without_gpu = all(part["device"] != "GPU" for part in found)
    lines = [
        "| | "
        + " | ".join(f"{SIZES[part['size']]}, {part['device']}" for part in found)
        + (" | GPU |" if without_gpu else " |"),
        "|" + "---|" * (len(found) + 1 + without_gpu),
    ]
    for name in dict.fromkeys(row["row"] for part in found for row in part["rows"]):
        cells = []
        for part in found:
            row = next((row for row in part["rows"] if row["row"] == name), None)
            cells.append(
                f"{row['loop_ms'] / row['ours_ms']:.1f}x ({row['ours_ms']:.2g} of {row['loop_ms']:.2g} ms; "
                f"goal {row['goal']}x{gpu_memory(row)})"
                if row
                else "–"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + (" | not measured |" if without_gpu else " |"))
    exact = max(r["agreement"] for part in found for r in part["rows"] if "attribute" not in r["row"])
    ranks = min(r["agreement"] for part in found for r in part["rows"] if "attribute" in r["row"])
    floors = "; ".join(
        f"{SIZES[p['size']]}, {p['device']}: {p['floor_ms']:.2g} ms at {p['gflops']:.0f}" for p in found
    )
    grown = "; ".join(
        f"{axis} " + ", ".join(f"{curve['slope']:.2f}" for curve in verbs.values())
        for axis, verbs in slopes.items()
    )
    verbs = "`, `".join(next(iter(slopes.values())))
    return "\n".join(
        [
            *lines,
            "",
            "Ratios; in brackets milliseconds a site. All matrices of one contrast unless said, medians of "
            f"{found[0]['repeats']} interleaved repeats; `attribute_step` beside exact exchanges of a sample of "
            f"its sites. Both ways agree to {exact:.0e} of the measure; attributions rank sites like exact "
            f"exchanges (Spearman at least {ranks:.2f}). Floor, the matrix products of one forward pass of the "
            f"measure at the machine's own rate in GFLOP/s: {floors}. "
            f"Log-log slopes of `{verbs}` against the number of {grown} "
            f"(`.readme/scaling.png`). {stamp(__file__)}",
            "",
            *memory_table(memory, {p["size"]: p["parameters"] * 4 / 2**20 for p in found}),
        ]
    )


def memory_table(memory: dict[str, dict[str, dict[str, float]]], models: dict[str, float]) -> list[str]:
    """Lines: what verbs need at their peak, in megabytes."""
    lines = [
        f"| resident MB beyond model and checkpoint | model | {' | '.join(MEMORY)} | goal |",
        "|---|---|" + "---|" * (len(MEMORY) + 1),
    ]
    for size, verbs in memory.items():
        for verb, needs in verbs.items():
            goal = f"{MEMORY_GOALS[size](models[size]):.0f}" if verb in SWEEPS else "–"
            cells = " | ".join(f"{mb:.0f}" for mb in needs.values())
            lines.append(f"| {SIZES[size]}: `{verb}` | {models[size]:.0f} | {cells} | {goal} |")
    return [
        *lines,
        "",
        "At the peak of one call, 1 thread, a process for each, the larger of two. The goal is that of a sweep of "
        "all matrices.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("runs/patching-speed.json"))
    given = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    settings = [(size, threads, "cpu") for size in given.sizes for threads in given.threads]
    settings += [(size, 1, "cuda") for size in given.sizes if torch.cuda.is_available()]
    tables = [measure(size, given.repeats, threads, device) for size, threads, device in settings]
    memory = {
        size: {
            verb: {
                how: max(extra_memory(size, verb, n_bytes) for _ in range(2))
                for how, n_bytes in MEMORY.items()
            }
            for verb in (*SWEEPS, *OTHERS)
        }
        for size in given.sizes
    }
    slopes = scaling(given.repeats)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    kept = {"tables": tables, "memory": memory, "scaling": slopes}
    given.json.write_text(json.dumps(kept, indent=1))
    picture(slopes, beside("scaling.png") if given.readme else given.json.with_suffix(".png"))
    conclude(given, "speed", table(tables, memory, slopes))


if __name__ == "__main__":
    main()
