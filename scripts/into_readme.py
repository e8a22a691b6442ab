"""What the scripts that measure have in common: names of results, tables in the README, and their last line."""

from __future__ import annotations

import json
import os
import platform
import zlib
from datetime import UTC, datetime
from pathlib import Path

import numpy.typing as npt
import torch

import dynamics as dy
from checkpoints import Trajectory

README = Path(__file__).parent.parent / "README.md"


def write(name: str, text: str) -> None:
    """Put a table between the marks `<!-- name: begin -->` and `<!-- name: end -->`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = README.read_text().partition(begin)
    _, _, after = rest.partition(end)
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def run_key(run: Trajectory) -> str:
    """A name for what is found in a run: its seed and a checksum of its whole configuration."""
    return f"seed-{run.config['seed']}-{zlib.crc32(json.dumps(run.config, sort_keys=True).encode()):08x}"


def interval(values: npt.ArrayLike) -> str:
    """Mean with its 95 % t interval over the last axis."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*map(float, dy.statistics.mean_interval(values)))


def stamp(script: str) -> str:
    """When, where and by which script a table was made."""
    machine = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine}, torch {torch.__version__}; `scripts/{Path(script).name}`."
    )
