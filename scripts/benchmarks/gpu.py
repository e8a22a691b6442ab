"""All that needs a GPU, in one go: tests, speed, determinism, running out of memory. Under 8 minutes.

    .venv/bin/python scripts/benchmarks/gpu.py

Takes the suite's CUDA tests; every verb at the toy's size, the seed's and GPT-2 small's beside the obvious loop,
with its memory and the calls for which the GPU is waited for; replays twice, which must give the same bits; and
lets memory run out. JSON is written after each part, so that nothing is lost where time runs out; what failed is
printed.
`--device cpu` takes the same in small, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import dynamics as dy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.benchmarks import seed_loop
from scripts.benchmarks.patching_speed import Bench
from scripts.benchmarks.verb_cases import VERBS, Case, bench_of, case_of, n_bytes
from scripts.shared.synchronising_calls import counted

ROOT = Path(__file__).parents[2]
CUDA_TESTS = ROOT / "tests" / "engine" / "test_runs_cuda.py"
SIZES = {"cuda": ("toy", "seed", "gpt2"), "cpu": ("tiny",)}
SECONDS = 450
"""After so many no further part is begun."""

REPEATS, LOOPED_SITES = 3, 3
GOAL = 30.0
"""Times as fast as the loop on the same device, at the toy's and the seed's size."""


class Failed(Exception):
    """A check did not hold; the message says what was found."""


def tests(device: str) -> dict[str, Any]:
    """The suite's CUDA tests, in a process of their own; on the CPU they are but collected."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CUDA_TESTS)]
    if device == "cpu":
        command.append("--collect-only")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    found = {"exit": done.returncode, "said": done.stdout[-6000:] + done.stderr[-2000:]}
    if done.returncode:
        raise Failed(str(found["said"]))
    return found


def waited(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    waited(device)
    begin = time.perf_counter()
    found = function()
    waited(device)
    return time.perf_counter() - begin, found


def speed(bench: Bench, size: str, verb: str, device: str) -> dict[str, Any]:
    """A verb: seconds a site, beside the loop's, agreement, memory, waits."""
    case = case_of(bench, size, verb)
    first, _ = timed(case, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds, found = min((timed(case, device) for _ in range(REPEATS)), key=lambda pair: pair[0])
    row: dict[str, Any] = {"sites": len(case.sites), "first_call": first, "seconds": seconds}
    row["seconds_a_site"] = seconds / len(case.sites)
    if device == "cuda":
        row["models"] = (torch.cuda.max_memory_allocated() - before) / n_bytes(bench)
    with counted() as calls:
        case()
    row["waits"] = dict(calls)
    row["paths"] = json.loads(found.attrs["provenance"])["paths"]
    if not all(bool(np.isfinite(found[name]).all()) for name in found.data_vars):
        raise Failed(f"a result is not finite: {found}")
    if verb != "attribute_step":
        picked = case.sites[:LOOPED_SITES]
        loop, theirs = timed(partial(looped, bench, verb, picked), device)
        row["loop_seconds_a_site"] = loop / len(picked)
        row["times_as_fast"] = row["loop_seconds_a_site"] / row["seconds_a_site"]
        row["goal"] = GOAL
        ours = found["patched"].values[0, : len(picked)]
        row["apart"] = float(np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))))
        if row["apart"] > 1e-3:  # GPU kernels round by their shape
            raise Failed(f"{verb} and the loop differ by {row['apart']:.1e} of the measure")
    return row


def looped(bench: Bench, verb: str, sites: list[dy.Site]) -> np.ndarray:
    """The seed's way."""
    given = (bench.recipe, bench.state, bench.contrasts[:1], sites, dy.measures.correct_logit)
    return np.array([float(value) for value in seed_loop.patched(verb, *given)])


def thirty_contrasts(bench: Bench, device: str) -> dict[str, Any]:
    """All matrices of 30 contrasts at the seed's size; the goal is 10 seconds."""
    sites, contrasts = dy.sites.matrices(bench.recipe.model), bench.contrasts[:30]
    given = (bench.recipe, bench.state, contrasts, sites, dy.measures.correct_logit)
    return {verb: timed(partial(getattr(dy, verb), *given), device)[0] for verb in VERBS[:2]}


def determinism(bench: Bench, device: str) -> dict[str, Any]:
    """Replays of three steps, twice, as torch is and with its deterministic algorithms: how many tensors differ."""

    def differing() -> list[str]:
        batch = bench.contrasts[0].base
        once, again = (
            dy.steps.advance(bench.recipe, bench.state, bench.state.step + 3, lambda step: batch)
            for _ in range(2)
        )
        return [n for n, p in once.parameters.items() if not torch.equal(p, again.parameters[n])]

    found = {"as torch is": differing()}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found["deterministic algorithms"] = differing()
    finally:
        torch.use_deterministic_algorithms(False)
    if found["deterministic algorithms"]:
        raise Failed(f"replays differ in {found}")
    return found


def same(one: xr.Dataset, other: xr.Dataset) -> float:
    """How far two results are apart, beside the larger of 1 and the measure."""
    return max(
        float(np.max(np.abs(one[n] - other[n]) / np.maximum(1, np.abs(other[n])))) for n in other.data_vars
    )


def out_of_memory(bench: Bench, size: str, device: str) -> dict[str, Any]:
    """With stacks that the device has no room for, verbs take fewer models at a time and find the same."""
    found: dict[str, Any] = {}
    for verb in VERBS:
        case: Case = case_of(bench, size, verb)
        with dy.max_memory(1):
            single = case()
        if device == "cuda":
            total, held = torch.cuda.mem_get_info()[1], torch.cuda.memory_reserved()
            torch.cuda.set_per_process_memory_fraction(min(1.0, (held + 8 * n_bytes(bench) + 2**28) / total))
        try:
            with dy.max_memory(2**40):  # more than there is
                whole = case()
        finally:
            if device == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0)
                torch.cuda.empty_cache()
        paths = json.loads(whole.attrs["provenance"])["paths"]
        found[verb] = {"apart": same(whole, single), "paths": paths}
        if found[verb]["apart"] > 1e-3:
            raise Failed(f"{verb} found something else where memory was short: {found[verb]}")
    return found


def parts(device: str) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is done, by name, in order."""
    benches: dict[str, Bench] = {}

    def bench(size: str) -> Bench:
        if size not in benches:
            benches.clear()
            benches[size] = bench_of(size, device)
        return benches[size]

    found: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("the suite's CUDA tests", lambda: tests(device))
    ]
    for size in SIZES[device]:
        found += [
            (f"{size}: {verb}", lambda size=size, verb=verb: speed(bench(size), size, verb, device))
            for verb in VERBS
        ]
        found.append((f"{size}: replayed twice", lambda size=size: determinism(bench(size), device)))
        if size == "seed":
            found.append((f"{size}: 30 contrasts", lambda size=size: thirty_contrasts(bench(size), device)))
        if size in ("seed", "tiny"):
            found.append(
                (f"{size}: out of memory", lambda size=size: out_of_memory(bench(size), size, device))
            )
    return found


def run(device: str, path: Path, seconds: float = SECONDS) -> list[str]:
    """All parts, kept in a file after each; what failed, a line each."""
    warnings.filterwarnings("ignore")
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    kept: dict[str, Any] = {**facts, "parts": {}}
    failed, begin = [], time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, function in parts(device):
        started = time.perf_counter()
        if started - begin > seconds:
            found = {"failed": f"not begun: {seconds} seconds were over"}
        else:
            try:
                found = function()
            except Exception:  # noqa: BLE001 (every part is tried, whatever became of the others)
                found = {"failed": traceback.format_exc()[-4000:]}
        found["took"] = time.perf_counter() - started
        kept["parts"][name] = found
        path.write_text(json.dumps(kept, indent=1, default=str))
        if "failed" in found:
            failed.append(f"{name}: {found['failed'].strip().splitlines()[-1]}")
        print(line(name, found), flush=True)
    return failed


def line(name: str, found: dict[str, Any]) -> str:
    """One part in one line."""
    said = [f"{found['took']:.1f} s"]
    if "seconds_a_site" in found:
        said.append(f"{1e3 * found['seconds_a_site']:.2f} ms a site")
    if "times_as_fast" in found:
        said.append(f"{found['times_as_fast']:.1f}x the loop (goal {found['goal']:.0f}x)")
    if "models" in found:
        said.append(f"{found['models']:.1f} models of memory")
    if "waits" in found:
        said.append(f"{sum(found['waits'].values())} waits")
    return f"{'FAILED' if 'failed' in found else 'ok':6} {name}: {', '.join(said)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"))
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu tries the script in small.")
    failed = run(given.device, given.json)
    print("\n".join(["", f"{len(failed)} failed.", *failed]))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
