"""Make one HTML file of runs that opens anywhere: curves, maps, tables, accounts, and their data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynamics.cli.parsing import CommandError, Parser


def run(words: Sequence[str]) -> None:
    """`dynamics report RUN [RUN ...] -o FILE.html`."""
    parser = Parser(
        prog="dynamics report",
        usage="dynamics report RUN [RUN ...] -o FILE.html [--results PATH ...] [--overwrite]",
        description="One file that opens without a network: what was trained, maps of sites, each example's "
        "answers, transfer, the account, the order of events and where all of it comes from; under each picture "
        "its data and what makes it. Of several runs the first is shown in full, and all beside each other.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--out", "-o", type=Path, required=True, metavar="FILE.html", help="the file to write"
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders of results of the first run, besides RUN/results",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    given = parser.parse_args(list(words))
    if given.out.suffix.lower() not in (".html", ".htm"):
        raise CommandError(
            f"-o {given.out}: a report is one HTML file; expected {given.out.with_suffix('.html')}."
        )

    from dynamics import report

    path = report.write(given.runs, given.out, given.results, given.overwrite)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB. It opens in any browser, without a network.")
