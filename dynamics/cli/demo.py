"""Show in two minutes what this is about: train a small model, and see where one step wrote new facts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynamics.cli.parsing import Parser

NEXT = """What to try next:
  dynamics show {folder}                                    what the run holds
  dynamics account {folder}                                 what every step, part and fact wrote
  dynamics plot {folder}/results/demo.h5 --out demo.svg     the figure again
  dynamics study aliases --out runs/aliases                 whom does a model believe? (3 minutes)
Your own model in 40 lines: docs/tutorials/own_model.md"""


def run(words: Sequence[str]) -> None:
    """`dynamics demo [--out RUN]`."""
    parser = Parser(
        prog="dynamics demo",
        usage="dynamics demo [--out RUN]",
        description="A small transformer learns facts, and then new ones. One step on new ones is taken again with "
        "the gradient of one part at a time: which part brings the answers?",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="the run's folder; default: runs/demo"
    )
    given = parser.parse_args(list(words))
    import torch

    from dynamics.studies.demonstration import demonstrate

    torch.set_num_threads(1)
    shown = demonstrate(given.out)
    print(
        "One step stated new capitals. How much more likely are they in other questions, if one part's gradient\n"
        "comes from the true statements and all others' from false ones?\n\n"
        f"{shown.table}\n\n{shown.figure} shows it. Everything is in {shown.folder}.\n\n"
        f"{NEXT.format(folder=shown.folder)}"
    )
