"""Write one checkpoint's parameters and buffers as a state dict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynamics.cli.parsing import Parser


def run(words: Sequence[str]) -> None:
    """`dynamics export RUN --step N --to FILE`."""
    parser = Parser(
        prog="dynamics export",
        usage="dynamics export RUN --step N --to FILE.safetensors|FILE.pt",
        description="Write one checkpoint's parameters and buffers as a state dict.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--step", type=int, required=True, help="a stored step")
    parser.add_argument("--to", type=Path, required=True, help="a new file, .safetensors or .pt")
    given = parser.parse_args(list(words))

    from checkpoints import Trajectory

    Trajectory.open(given.run).export(given.step, given.to)
    print(f"Step {given.step} of {given.run} is in {given.to}.")
