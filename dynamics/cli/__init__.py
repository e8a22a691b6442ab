"""The command line, one file a subcommand; `commands` has the table of them."""

from dynamics.cli.commands import main as main
