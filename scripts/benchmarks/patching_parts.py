"""Where the time of each verb goes, beside its goal and a floor. About 5 minutes on one core.

    .venv/bin/python scripts/benchmarks/patching_parts.py --readme

The rows of `patching_speed.py` with one contrast, 1 thread; the verbs' own functions are timed during their
calls. The goal is what it leaves for a call, the floor what its work takes at the machine's own rate.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dynamics.results import REFERENCES

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.benchmarks.patching_speed import (
    PRESETS,
    SIZES,
    Bench,
    Row,
    clock,
    config_of,
    every,
    looped,
    ours,
    rate_of,
    rows,
    timed,
)
from scripts.shared import runs
from scripts.shared.into_readme import conclude, stamp

_ENGINE, _STEPS, _SIGNALS = "dynamics.engine", "dynamics.steps", "dynamics.patching.signals"

PARTS: dict[str, list[str]] = {
    "gradients": [
        f"{_ENGINE}.gradient_prefetch.GradientPrefetch.gradient",
        f"{_SIGNALS}.recorded",
        f"{_SIGNALS}.pullbacks",
    ],
    "references": [],
    "backward from the sites": [f"{_STEPS}.pullbacks.Pullbacks.exchanging", f"{_SIGNALS}.gradient"],
    "steps": [f"{_STEPS}.update.Steps.begin", f"{_STEPS}.worker_threads.Spread.join"],
    "measure": [f"{_ENGINE}.measuring.Measuring.{name}" for name in ("__call__", "variants_of", "one_model")],
    "slopes": [f"{_ENGINE}.path_integral.StraightPath.{name}" for name in ("mean_gradient", "elements")],
}
"""The functions that do a part of the work, by name, as a profiler knows them; where one calls another, the outer
one's part counts. Steps and measure are the references' until these are measured."""

OWN = ("patch_gradients", "patch_signals")
"""Verbs that step every parameter of every patched model."""


@contextmanager
def taken_apart() -> Iterator[Counter[str]]:
    """Seconds that a verb's call inside spends on each part."""
    spent: Counter[str] = Counter()
    within: list[str] = []
    n_measured = 0

    def watched(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **settings: Any) -> Any:
            nonlocal n_measured
            if within:
                return function(*args, **settings)
            refers = part in ("steps", "measure") and n_measured < len(REFERENCES)
            within.append("references" if refers else part)
            begin = clock()
            try:
                found = function(*args, **settings)
            finally:
                spent[within.pop()] += clock() - begin
            n_measured += len(np.atleast_2d(found)) if part == "measure" else 0
            return found

        return watching

    with ExitStack() as patches:
        for part, places in PARTS.items():
            for place in places:
                patches.enter_context(mock.patch(place, watched(part, resolve_name(place))))
        yield spent


def passes_ms(parameters: int, n: int) -> float:
    """Milliseconds of one square root and one write for each parameter of n models, in blocks in the cache."""
    block = torch.rand(16, 16384)
    after = torch.empty_like(block)

    def once() -> None:
        torch.sqrt(block, out=after)
        after.copy_(block)

    once()
    return 1e3 * n * parameters / block.numel() * statistics.median(timed(once)[0] for _ in range(50))


def taken(bench: Bench, row: Row, size: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of one call by part, what the goal leaves for it, and the floor."""
    ours(bench, row)
    wholes, found = [], []
    for _ in range(repeats):
        with taken_apart() as spent:
            wholes.append(timed(lambda: ours(bench, row))[0])
        found.append(spent)
    picked = row.sites[:: every(row, size)]
    loop = statistics.median(timed(lambda: looped(bench, row, picked))[0] for _ in range(repeats)) / len(
        picked
    )
    with FlopCounterMode(display=False) as counter:
        ours(bench, row)
    config, parameters = bench.recipe.model.config, sum(p.numel() for p in bench.recipe.model.parameters())
    n_rows, n_sites = row.contrasts[0].probe.tokens.numel(), len(row.sites)
    shape = (n_rows, config.d_model, 16) if row.verb in OWN else (1024, 1024, 1)
    products = 1e3 * counter.get_total_flops() / rate_of(*shape)
    whole = 1e3 * statistics.median(wholes)
    parts = {part: 1e3 * statistics.median(spent[part] for spent in found) for part in PARTS}
    return {
        "row": row.name,
        "sites": n_sites,
        "loop": 1e3 * loop * n_sites,
        "whole": whole,
        "parts": {**parts, "the rest": whole - sum(parts.values())},
        "floor": products + (passes_ms(parameters, n_sites) if row.verb in OWN else 0.0),
    }


def table(found: dict[str, list[dict[str, Any]]], goals: dict[str, dict[str, int]], repeats: int) -> str:
    """One line for each verb and size."""
    columns = [*PARTS, "the rest"]
    lines = [
        "| ms of one call | goal leaves | takes | " + " | ".join(columns) + " | floor | ratio at the floor |",
        "|" + "---|" * (len(columns) + 5),
    ]
    for size, of_size in found.items():
        for part in of_size:
            leaves = part["loop"] / goals[size][part["row"]]
            cells = [f"{part['parts'][name]:.0f}" if part["parts"][name] >= 0.5 else "–" for name in columns]
            lines.append(
                f"| {SIZES[size]}: {part['row']}, {part['sites']} sites | {leaves:.0f} | {part['whole']:.0f} | "
                + " | ".join(cells)
                + f" | {part['floor']:.0f} | {part['loop'] / part['floor']:.1f}x |"
            )
    return "\n".join(
        [
            *lines,
            "",
            "One contrast, 1 thread. Goal leaves: what the seed's loop takes over the goal. Gradients: of the base "
            "and the source batch. References: the four that every result holds, stepped and measured. Backward "
            "from the sites, steps, measure: of the patched models. Slopes: the measure's gradients. Floor: all "
            "matrix products of the call and, where every parameter of a patched model is its own, one square root "
            "and one write for each, which AdamW cannot do without; there products run at the rate of the probe's "
            "rows times a matrix of each model's own, elsewhere at that of one large product. Medians of "
            f"{repeats}. {stamp(__file__)}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("runs/patching-parts.json"))
    given = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found, goals = {}, {}
    for size in given.sizes:
        bench = Bench.of(config_of(size))
        of_size = [row for row in rows(bench, size) if len(row.contrasts) == 1]
        goals[size] = {row.name: row.goals[size] for row in of_size}
        found[size] = [taken(bench, row, size, given.repeats) for row in tqdm(of_size, desc=size)]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1))
    conclude(given, "parts", table(found, goals, given.repeats))


if __name__ == "__main__":
    main()
