"""The noun of a report: one picture, the Dataset it shows, and what makes it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import xarray as xr

from dynamics import results
from dynamics.report.packing import packed
from dynamics.report.runs import Result, Run

Kind = Literal["lines", "multiples", "map", "scatter", "transfer", "stack", "table"]
"""How the page draws a Dataset."""


@dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Attributes:
        kind: how it is drawn.
        title: what is seen, in plain words.
        says: how to read it.
        dataset: what is drawn, and saved as CSV.
        commands: that make the Dataset, and a figure of it, from a shell.
        python: lines that do the same. In both, {sel}, {at}, {level}, {variable} and {draw} stand for what is
            chosen on the page.
        settings: of the kind; see `templates/script/figures.js`.
    """

    kind: Kind
    title: str
    says: str
    dataset: xr.Dataset
    commands: tuple[str, ...]
    python: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the page holds it."""
        return {
            "kind": self.kind,
            "title": self.title,
            "says": self.says,
            "data": packed(self.dataset),
            "commands": list(self.commands),
            "python": self.python,
            **self.settings,
        }


@dataclass(frozen=True)
class Section:
    """A heading and the pictures below it; a section without any is left out."""

    title: str
    says: str
    figures: tuple[Figure, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the page holds it."""
        return {"title": self.title, "says": self.says, "figures": [f.to_json() for f in self.figures]}


def made_by(run: Run, result: Result) -> tuple[str, ...]:
    """The command that made a file of results of a run, as far as its provenance says; else none."""
    facts, folder, dataset = result.facts, run.folder, result.dataset
    place = result.path.parent.name
    if place.startswith("compare-every-"):
        return (f"dynamics compare {folder} --every",)
    if place.startswith("compare-") and place.count("-") == 2:
        before, after = place.split("-")[1:]
        return (f"dynamics compare {folder} --from {before} --to {after}",)
    if results.is_account(dataset) and "measures" in facts:
        first, last = int(dataset["step"][0]), int(dataset["step"][-1])
        levels = _words(dict.fromkeys(dataset["level"].values.tolist()))
        return (
            f"dynamics account {folder} --from {first} --to {last} --levels {levels} "
            f"--measures {_words(facts['measures'])}",
        )
    if "source_steps" in facts:
        into, source = _words(facts["steps"]), _words(facts["source_steps"])
        return (f"dynamics transfer {folder} --from {source} --into {into} --verb {facts['verb']}",)
    if "optimizers" in facts and "steps" in facts:
        return (
            f"dynamics sweep {folder} --out {result.path.parent} --verb {facts['verb']} "
            f"--steps {_words(facts['steps'])} --measures {_words(facts['measures'])} "
            f"--optimizers {_words(facts['optimizers'])}",
        )
    if "config" in facts and result.path.parent.name == "results":
        return (f"dynamics study aliases --config {folder / 'config.yaml'} --out {folder}",)
    return ()


def _words(values: Sequence[Any] | Mapping[Any, Any]) -> str:
    return " ".join(map(str, values))


def loaded(result: Result, name: str) -> str:
    """Python lines that read a file of results under a name."""
    return f'import dynamics as dy\n\n{name} = dy.results.load("{result.path.as_posix()}")'
