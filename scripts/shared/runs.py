"""Scripts over runs: their command line, several processes, and Datasets that are computed once and kept."""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import xarray as xr
from tqdm import tqdm

import dynamics as dy
from checkpoints import Trajectory


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of all that measure: their docstring, and `--readme`."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--readme", action="store_true", help="write what is found into its page of docs/ or the README"
    )
    return made


def parser_of_runs(
    description: str | None, out: str, runs: str = "run folders, one per seed; at least two"
) -> argparse.ArgumentParser:
    """The command line of those that look at trained runs: `parser` with the runs' folders and `--out`."""
    made = parser(description)
    made.add_argument("runs", type=Path, nargs="+", help=runs)
    made.add_argument("--out", type=Path, default=Path("runs") / out, help="where results are kept")
    return made


TITLES = {"ioi": "Indirect objects", "acronyms": "Acronyms", "facts": "Facts"}
"""What pictures call the small languages."""

Result = TypeVar("Result")


def each(
    function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], workers: int, unit: str = "run"
) -> list[Result]:
    """`function(*job)` of every job, in their order, by as many processes as there are workers; one is this one."""
    jobs = list(jobs)
    if workers == 1:
        return [function(*job) for job in tqdm(jobs, unit=unit)]
    with ProcessPoolExecutor(workers) as pool:
        running = [pool.submit(function, *job) for job in jobs]
        return [job.result() for job in tqdm(running, unit=unit)]


def run_key(run: Trajectory) -> str:
    """A name for what is found in a run: its seed and a checksum of its whole configuration."""
    return f"seed-{run.config['seed']}-{zlib.crc32(json.dumps(run.config, sort_keys=True).encode()):08x}"


def stored(path: Path, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
    """The Dataset in a file, computed and saved there if there is none yet."""
    if not path.exists():
        dy.results.save(compute(), path)
    return dy.results.load(path)


def by_task(found: Sequence[Any]) -> dict[str, list[Any]]:
    """What was found in runs (each has a `task` and a `seed`), of each task, by seed."""
    names = dict.fromkeys(one.task for one in found)
    return {name: sorted((f for f in found if f.task == name), key=lambda f: f.seed) for name in names}
