"""Every verb with one thread and with two, also beside a busy process, and its memory. About 5 minutes on 2 cores.

    .venv/bin/python scripts/benchmarks/threads.py --readme

Seconds a site are medians of interleaved repeats, each verb and size in a process of its own. Memory is what one
call needs at its peak beyond the model and the checkpoint (parameters and both moments), in models. Every run has
to give the same bits.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.benchmarks.patching_speed import SIZES
from scripts.benchmarks.verb_cases import VERBS, bench_of, case_of, n_bytes
from scripts.shared import runs
from scripts.shared.into_readme import conclude, markdown, stamp

REPEATS = {"toy": 5, "seed": 1, "gpt2": 1, "tiny": 1}
"""Each is a call with one thread and one with two; and again beside a busy process."""

NAMES = {**SIZES, "gpt2": "GPT-2 small", "tiny": "tiny GPT-2"}
THREADS = (1, 2)
_SPINNING = "while True: pass"


def resident(which: str) -> int:
    """Bytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


@contextmanager
def busy(is_busy: bool) -> Iterator[None]:
    """Inside, another process keeps one core busy."""
    if not is_busy:
        yield
        return
    spinning = multiprocessing.get_context("spawn").Process(target=exec, args=(_SPINNING, {}), daemon=True)
    spinning.start()
    try:
        yield
    finally:
        spinning.kill()
        spinning.join()


def measured(size: str, verb: str) -> dict[str, Any]:
    """Seconds a site by circumstances and threads, models of memory by threads, and whether all bits were alike."""
    warnings.filterwarnings("ignore")
    case_of(bench_of("tiny"), "tiny", verb)()  # the code itself is loaded
    bench = bench_of(size)
    case = case_of(bench, size, verb)
    seconds: dict[str, dict[int, float]] = {}
    memory: dict[int, float] = {}
    found = []
    for where in ("alone", "beside"):
        times: dict[int, list[float]] = {n: [] for n in THREADS}
        with busy(where == "beside"):
            for _ in range(REPEATS[size]):
                for n in THREADS:
                    torch.set_num_threads(n)
                    gc.collect()
                    ctypes.CDLL(None).malloc_trim(0)
                    before = resident("VmRSS")
                    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
                    begin = time.perf_counter()
                    found.append(case())
                    times[n].append(time.perf_counter() - begin)
                    needed = (resident("VmHWM") - before) / n_bytes(bench)
                    memory[n] = max(memory.get(n, 0.0), needed)
        seconds[where] = {n: statistics.median(t) / len(case.sites) for n, t in times.items()}
    alike = all(one.equals(found[0]) for one in found)
    return {
        "size": size,
        "verb": verb,
        "sites": len(case.sites),
        "seconds": seconds,
        "models": memory,
        "alike": alike,
    }


def ratio_of_memory() -> float:
    """How many times as fast two threads add large tensors as one: work that waits for memory gains no more."""
    a, b, out = torch.ones(3, 2**26)
    seconds = []
    for n in THREADS:
        torch.set_num_threads(n)
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            torch.add(a, b, out=out)
            times.append(time.perf_counter() - begin)
        seconds.append(statistics.median(times))
    return seconds[0] / seconds[1]


def table(found: Sequence[dict[str, Any]], of_memory: float) -> str:
    """A row for each size and verb."""
    head = ["", "sites", "s a site, 1 thread", "2 threads", "ratio", "beside a busy process, 1", "2", "ratio"]
    head += ["models of memory, 1", "2", "same bits"]
    rows = []
    for row in found:
        cells = [f"{NAMES[row['size']]}: `{row['verb']}`", str(row["sites"])]
        for times in row["seconds"].values():
            cells += [f"{times[1]:.2g}", f"{times[2]:.2g}", f"{times[1] / times[2]:.2f}x"]
        cells += [f"{row['models'][n]:.1f}" for n in THREADS] + ["yes" if row["alike"] else "NO"]
        rows.append(cells)
    note = (
        "Medians of interleaved repeats (five on the toy, one else), one contrast, by the clock; models of memory "
        f"at the peak, beyond model and checkpoint. Adding two tensors of 256 MiB is {of_memory:.2f}x as fast with "
        f"two threads as with one. {stamp(__file__)}"
    )
    return "\n".join([*markdown(head, rows), "", note])


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=NAMES, default=["toy", "seed", "gpt2"])
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--json", type=Path, default=Path("runs/threads.json"))
    given = parser.parse_args(argv)
    found = []
    for size in given.sizes:
        for verb in given.verbs:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found.append(pool.submit(measured, size, verb).result())
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1))
    conclude(given, "threads", table(found, ratio_of_memory()))


if __name__ == "__main__":
    main()
