"""The subcommands of `dynamics`, and the entry point: parse, call, print. All they do are public functions.

A command is a module with a function `run` of the words after its name; the first line of its docstring is what
`dynamics --help` says of it. A new one needs its file and its line in `COMMANDS`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from dynamics.cli import (
    account,
    believe,
    compare,
    demo,
    export,
    fit,
    importing,
    plot,
    report,
    show,
    study,
    sweep,
    transfer,
    verify,
)
from dynamics.cli.parsing import CommandError, HelpFormatter, Parser
from dynamics.config import ConfigError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class Command(Protocol):
    """A subcommand."""

    def run(self, words: Sequence[str]) -> None:
        """Do what the words after the command's name ask for."""


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "study": study,
    "fit": fit,
    "verify": verify,
    "show": show,
    "plot": plot,
    "report": report,
    "believe": believe,
    "compare": compare,
    "sweep": sweep,
    "account": account,
    "transfer": transfer,
    "import": importing,
    "export": export,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script `dynamics`; exits with 0, 1 on an error, 130 on Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS[_parser().parse_args(words[:1]).command]
    try:
        command.run(words[1:])
    except SystemExit:  # such as after --help, which need not wait for the library that errors come from
        raise
    except KeyboardInterrupt:
        _complain("Stopped. What was stored is kept; the same command goes on from there.")
        sys.exit(INTERRUPTED)
    except _user_errors() as error:
        _complain("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
        sys.exit(1)


def _parser() -> Parser:
    """The parser of the first word."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(c.__doc__ or '').partition('.')[0]}" for name, c in COMMANDS.items()]
    parser = Parser(
        prog="dynamics",
        usage="dynamics COMMAND ...",
        description="Find where training put a behaviour: train, keep a trajectory, replay steps with one\n"
        "gradient exchanged, and measure what changed.",
        epilog="\n".join(["commands (dynamics COMMAND --help says more):", *lines]),
        formatter_class=HelpFormatter,
        version=_version(),
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of those below")
    return parser


def _version() -> str:
    try:
        return version("training-dynamics")
    except PackageNotFoundError:
        return "that is not installed"


def _user_errors() -> tuple[type[Exception], ...]:
    """What is the user's to mend and is shown without a traceback; imported only once something failed."""
    from checkpoints import TrajectoryError
    from dynamics.results import ResultsError
    from dynamics.sites import SiteError
    from dynamics.sweeps import SweepError
    from dynamics.training import NonFiniteLoss, RunError

    return (
        *(CommandError, ConfigError, TrajectoryError, ResultsError, SiteError, SweepError),
        *(NonFiniteLoss, RunError, OSError),
    )


def _complain(message: str) -> None:
    print(message, file=sys.stderr)
