"""What every part of a config is checked with, and made from plain data by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
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
    meant = did_you_mean(str(value), allowed)
    require(
        value in allowed, f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.{meant}"
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is spelled most like another, as a question that ends a message; "" if none is."""
    spelled = {each.casefold(): each for each in known}
    close = get_close_matches(word.casefold(), spelled, n=1)
    return f" Did you mean {spelled[close[0]]!r}?" if close else ""


def check_seed(name: str, seed: int | None) -> None:
    """Raise where a seed is negative; None is left to the run's own."""
    require(seed is None or seed >= 0, f"{name} is {seed}; a seed is at least 0.")


def built(kind: type[_Part], value: _Part | Mapping[str, Any], where: str) -> _Part:
    """A part of the config from plain data; unknown keys are named beside the valid ones."""
    if not isinstance(value, Mapping):
        return value
    valid = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    wrong = sorted(set(value) - valid)
    meant = did_you_mean(wrong[0], valid) if wrong else ""
    require(not wrong, f"unknown config keys {wrong} in {where}; valid are {sorted(valid)}.{meant}")
    return kind(**value)


def plain(value: Any) -> Any:
    """The value with tuples as lists, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
