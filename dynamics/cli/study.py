"""Run the whole alias study: train, exchange gradients, summarise and draw."""

from __future__ import annotations

from collections.abc import Sequence

from dynamics.cli import configs
from dynamics.cli.parsing import Parser
from dynamics.cli.runs import set_threads
from dynamics.config import StudyConfig


def run(words: Sequence[str]) -> None:
    """`dynamics study aliases --out RUN`."""
    parser = Parser(
        prog="dynamics study",
        usage=f"dynamics study aliases {configs.USAGE}",
        description="Train, patch, summarise and draw: the whole study into one folder.",
    )
    parser.add_argument("name", choices=["aliases"], help="which study")
    configs.add_config(parser, StudyConfig)
    given = parser.parse_args(list(words))
    set_threads(given.trainer.threads)
    from dynamics import studies

    report = studies.run(configs.config_of(given, StudyConfig), given.out)
    print(f"{report.table}\n\n{report.findings}\n\nEverything is in {report.folder}.")
