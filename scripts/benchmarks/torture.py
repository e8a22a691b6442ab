"""Kills, damage, full disks, hostile files: what is lost, what is let in. A few minutes; with `--long` hours.

Trials run in forked processes with a limit of time, so that a crash or a hang of the interpreter counts as what
it is. Linux alone. Exits with 1 where a promise was broken. With `--keep FOLDER` a row that was interrupted goes on
where it stopped, and rows run one by one make one table.

    .venv/bin/python scripts/benchmarks/torture.py --long --keep runs/torture
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoints import files

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.benchmarks.torture_rows import (
    appending,
    company,
    damage,
    disks,
    fuzzing,
    hostile,
    kills,
    packages,
    sweeps,
    verbs,
)
from scripts.shared.into_readme import markdown, stamp

Trials = Callable[[int, Path, np.random.Generator], Iterator[str]]
"""(number of trials, an empty folder, random numbers) -> the outcome of each; "BROKEN: ..." is a broken promise."""


@dataclass(frozen=True)
class Row:
    """A promise, as the docstring of its trials says it, and how often it is tried.

    Attributes:
        trials: what is done.
        short, long: how often, and how often with `--long`.
        at_once: trials on end; so many are lost where the script is interrupted.
    """

    trials: Trials
    short: int
    long: int
    at_once: int

    @property
    def promise(self) -> str:
        """What is promised."""
        return (self.trials.__doc__ or "").strip()


ROWS = {
    "kills": Row(kills.recording, 20, 500, 50),
    "lightning": Row(kills.lightning, 2, 50, 10),
    "study": Row(kills.study, 1, 20, 5),
    "imports": Row(kills.imports, 3, 50, 10),
    "fits": Row(kills.fits, 1, 20, 5),
    "sweeps": Row(sweeps.killed, 2, 50, 10),
    "clusters": Row(sweeps.clusters, 1, 30, 3),
    "damage": Row(damage.by_accident, 20, 1000, 100),
    "malice": Row(damage.sealed_again, 2, 100, 10),
    "hostile": Row(hostile.made_to_harm, 99, 99, 99),
    "quota": Row(disks.quota, 3, 50, 10),
    "disk": Row(disks.full, 3, 50, 10),
    "denied": Row(disks.denied, 2, 50, 10),
    "vanishing": Row(disks.vanishing, 2, 50, 10),
    "beside": Row(company.beside, 50, 20_000, 500),
    "locks": Row(company.locks, 2, 50, 10),
    "interruptions": Row(verbs.interruptions, 4, 200, 50),
    "calls": Row(verbs.calls, 10, 1000, 1000),
    "walks": Row(verbs.walks, 20, 200, 200),
    "appends": Row(appending.cost, 1000, 10_000, 10_000),
    "fuzzing": Row(fuzzing.readers, 10, 1200, 60),
    "packages": Row(packages.vulnerabilities, 1, 1, 1),
}


def tried(name: str, n: int, seed: int, keep: Path | None) -> Counter[str]:
    """The outcomes of a row's trials, counted; those that were kept are not tried again."""
    row, kept = ROWS[name], None if keep is None else keep / f"{name}-{n}-seed-{seed}.json"
    parts: list[dict[str, int]] = json.loads(kept.read_text()) if kept is not None and kept.exists() else []
    sizes = [min(row.at_once, n - first) for first in range(0, n, row.at_once)]
    for part in tqdm(range(len(parts), len(sizes)), desc=name, leave=False, disable=len(sizes) == 1):
        with tempfile.TemporaryDirectory() as folder:
            outcomes = row.trials(sizes[part], Path(folder) / "run", np.random.default_rng([seed, part]))
            parts.append(dict(Counter(outcomes)))
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(kept, json.dumps(parts).encode())
    return sum(map(Counter, parts), Counter())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="many more trials of each row")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="some rows alone")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    parser.add_argument("--keep", type=Path, help="a folder for outcomes, from which a second call goes on")
    given = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # before processes are forked
    tqdm.set_lock(threading.RLock())  # one that processes share stays locked where its holder is killed
    cells, all_broken = [], []
    for name in tqdm(given.rows, desc="rows"):
        found = tried(name, ROWS[name].long if given.long else ROWS[name].short, given.seed, given.keep)
        broken = {what: times for what, times in found.items() if what.startswith("BROKEN")}
        seen = "; ".join(f"{times} {what}" for what, times in found.items() if what not in broken)
        cells.append([ROWS[name].promise, str(found.total()), seen, str(sum(broken.values()))])
        all_broken += broken
    torch.set_num_threads(threads)
    print("\n".join(markdown(["promise", "trials", "outcomes", "broken"], cells)))
    print(f"\n{'Long counts' if given.long else 'Short counts'}, seed {given.seed}. {stamp(__file__)}")
    if all_broken:
        print("\n".join(all_broken), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
