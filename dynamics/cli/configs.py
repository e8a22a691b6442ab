"""Options for the keys of a run's config: `--config FILE`, `--preset NAME`, `--SECTION.KEY VALUE`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]

from dynamics.cli.parsing import Parser
from dynamics.config import RunConfig, StudyConfig, kind_of
from dynamics.config.checks import did_you_mean

_Run = TypeVar("_Run", bound=RunConfig)

PRESETS = files("dynamics") / "presets"
USAGE = "--out RUN [--preset NAME] [--config FILE] [--SECTION.KEY VALUE ...] [--print_config]"


class _ConfigOrPreset(ActionConfigFile):
    """`--config FILE` reads a config; `--preset NAME` one that ships with the package. Later arguments win."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string == "--preset":
            if values not in presets():
                meant = did_you_mean(values, presets())
                parser.error(f"no preset {values!r}; there are {', '.join(presets())}.{meant}")
            values = str(PRESETS / f"{values}.yaml")
        super().__call__(parser, namespace, values, option_string)  # type: ignore[no-untyped-call]


def presets() -> list[str]:
    """Names of the configs that ship with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in PRESETS.iterdir())


def add_config(parser: Parser, kind: type[RunConfig]) -> None:
    """Add `--out` and the options for every key of a config."""
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; an unfinished run goes on")
    parser.add_argument(
        "--config",
        "--preset",
        action=_ConfigOrPreset,
        help=f"a config file (YAML), or the name of one that ships with the package: {', '.join(presets())}",
    )
    parser.add_class_arguments(kind)


def config_of(given: Namespace, kind: type[_Run]) -> _Run:
    """The config that the options spell out."""
    parts = {f.name: given[f.name] for f in fields(kind)}
    return kind.from_dict(Namespace(parts).as_dict())  # type: ignore[no-untyped-call]


def kind_asked(words: Sequence[str]) -> type[RunConfig]:
    """The config class of the task that the words name, in `--task.name`, a config file or a preset.

    It is read before anything is parsed, as the task says which keys there are. A file that cannot be read is left
    to the parser to complain about.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--config", "--preset", "--task.name"):
        peek.add_argument(option, dest=option, action="append", nargs="?", default=[])
    given = vars(peek.parse_known_args(list(words))[0])
    if given["--task.name"]:
        return kind_of({"task": {"name": given["--task.name"][-1]}})
    shipped = [Path(str(PRESETS / f"{name}.yaml")) for name in given["--preset"] if name in presets()]
    for path in [*map(Path, filter(None, given["--config"])), *shipped]:
        with suppress(OSError, ValueError, yaml.YAMLError):
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(data, dict) and isinstance(data.get("task"), dict) and "name" in data["task"]:
                return kind_of(data)
    return StudyConfig
