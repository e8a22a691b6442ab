"""What every part of a config is checked with, and made from plain data by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args

_Part = TypeVar("_Part")


class ConfigError(ValueError):
    """A config that nothing could be run with; the message says what to change."""


def require(condition: bool, message: str) -> None:
    """Raise a ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def choice(name: str, value: object, literal: object) -> None:
    """Raise where the value is not one of a Literal's; the message lists them."""
    allowed = get_args(literal)
    require(value in allowed, f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def check_seed(name: str, seed: int | None) -> None:
    """Raise where a seed is negative; None is left to the run's own."""
    require(seed is None or seed >= 0, f"{name} is {seed}; a seed is at least 0.")


def built(kind: type[_Part], value: _Part | Mapping[str, Any], where: str) -> _Part:
    """A part of the config from plain data; unknown keys are named beside the valid ones."""
    if not isinstance(value, Mapping):
        return value
    valid = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    wrong = sorted(set(value) - valid)
    require(not wrong, f"unknown config keys {wrong} in {where}; valid are {sorted(valid)}.")
    return kind(**value)


def plain(value: Any) -> Any:
    """The value with tuples as lists, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
