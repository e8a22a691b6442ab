"""Train and keep the runs that findings rest on. About 3 minutes a seed on one core; 24 of them on two, 40 minutes.

The default alias study, seeds 400 to 423, each trained once to the end of X1; X2 is forked from there with the
roles of Dt3 and Df4 as drawn and exchanged. Seeds 400 to 411 are for exploring, 412 to 423 for confirming what was
written down before: docs/analyses/truth.md. Stopped at any moment, the same command goes on. Checkpoints take about
60 MB a fork; keep them outside the repository.

    .venv/bin/python scripts/experiments/runs.py ../runs-400 --workers 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamics.config import StudyConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.forks import CONFIRMED, EXPLORED, fill, sparse


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and say what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder that holds a folder for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*EXPLORED, *CONFIRMED])
    parser.add_argument("--workers", type=int, default=2, help="processes")
    given: Any = parser.parse_args(arguments)
    configs = {given.out / f"seed-{seed}": sparse(StudyConfig(seed=seed)) for seed in given.seeds}
    for held in fill(configs, given.workers):
        print(held)


if __name__ == "__main__":
    main()
