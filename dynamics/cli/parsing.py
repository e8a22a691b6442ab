"""The parser of a command: options are written in full, and an error names them as they are typed."""

from __future__ import annotations

import re
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from dynamics.config.checks import did_you_mean


class CommandError(Exception):
    """A command that asks for what is not there; the message says what is."""


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help whose description and epilog keep their lines."""


class Parser(ArgumentParser):
    """A parser that takes no option by its prefix, and whose errors suggest the one that was meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the usage and the message, explained, and exit with 2."""
        super().error(self._explained(message), ex)

    def _explained(self, message: str) -> str:
        if missing := re.fullmatch(r"the following arguments are required: (.+)", message):
            names = ", ".join(map(self._typed, missing[1].split(", ")))
            return f"the following arguments are required: {names}"
        if choice := re.search(r"invalid choice: '?([^']*?)'? \(choose from (.*)\)", message):
            known = re.findall(r"[^\s,']+", choice[2])
            return f"{message}.{did_you_mean(choice[1], known)}"
        for unknown in (
            r"unrecognized arguments: --(?P<name>[\w.-]+)",
            r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'",
            r"Option '(?P<name>[\w.]+)' is not accepted",
        ):
            if found := re.search(unknown, message):
                return message + self._options_like(".".join(found.groupdict().values()))
        return re.sub(r'Parser key "([\w.]+)"', lambda key: self._typed(key[1]), message)

    def _typed(self, name: str) -> str:
        """The option or argument that is kept under a name, as it is typed."""
        for action in self._actions:
            if action.dest == name:
                return action.option_strings[0] if action.option_strings else str(action.metavar or name)
        return name

    def _options_like(self, name: str) -> str:
        """The option that was meant, and all that could stand in its place."""
        options = [
            option
            for action in self._actions
            if action.help != SUPPRESS
            for option in action.option_strings
            if option.startswith("--")
        ]
        section = name.rpartition(".")[0]
        inside = {o.split(".")[section.count(".") + 1] for o in options if o.startswith(f"--{section}.")}
        here = f"keys of {section}" if inside else "options"
        known = inside or {option.split(".")[0] for option in options}
        return f".{did_you_mean(f'--{name}', options)}\n{here}: {', '.join(sorted(known))}"
