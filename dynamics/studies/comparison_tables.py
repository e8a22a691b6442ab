"""What a comparison of a run's checkpoints says, in words: sets, aliases or contrasts, sites, change points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from dynamics.comparison import when
from dynamics.results.text_tables import Cell, aligned
from dynamics.tasks import AliasTask, Task
from dynamics.tasks.probes import ORDERS

SHOWN = 10
"""Rows of a table."""

Found = Mapping[str, xr.Dataset]
Rows = list[list[Cell]]

PAIRS = {"x1": ("DtQ1", "DfQ2"), "x2": ("Dt3", "Df4")}
"""The reliable and the unreliable set that a phase is about."""


def by_set(dataset: xr.Dataset, name: str) -> xr.Dataset:
    """The mean over the aliases of a set."""
    chosen = dataset.isel(example=dataset["set"].values == name)
    bare = chosen.drop_vars([key for key, coord in chosen.coords.items() if "example" in coord.dims])
    return bare.mean("example", keep_attrs=True)


def at_level(dataset: xr.Dataset, level: str) -> xr.Dataset:
    """The sites of a level, such as "matrices"."""
    return dataset.isel(site=dataset["level"].values == level)


def pair_table(task: Task, found: Found, before: int, after: int) -> str:
    """Two checkpoints: the sets, then the examples, matrices, heads and activations that changed most."""
    examples = (
        {"aliases whose answers changed most": _alias_rows(task, found)}
        if isinstance(task, AliasTask)
        else {"contrasts whose answers changed most": _contrast_rows(found["logits"])}
    )
    tables = {
        "answers by set": _sets_rows(found["sets"]),
        **examples,
        "matrices that moved most": _top(
            at_level(found["weights"], "matrices"), "relative", ("relative", "cosine")
        ),
        "heads whose attention moved most": _top(found["patterns"], "divergence", ("divergence", "moved")),
        "activations that changed most": _top(found["activations"], "cka", ("cka",), ascending=True),
    }
    return "\n\n".join(
        [f"Step {before} to {after}", *(_under(title, rows) for title, rows in tables.items())]
    )


def _sets_rows(found: xr.Dataset) -> Rows:
    rows: Rows = [
        ["set", "accuracy", "", "", "loss (nat)", "", "", "KL (nat)", "share of predictions changed"]
    ]
    for i, name in enumerate(map(str, found["example"].values)):
        one = found.isel(example=i)
        changes = [*_change(one, "accuracy"), *_change(one, "loss")]
        rows.append([name, *changes, float(one["kl"]), float(one["changed"])])
    return rows


def _alias_rows(task: AliasTask, found: Found) -> Rows:
    """The aliases by the change of their accuracy, then by KL, with both orders and the most changed question."""
    logits, orders, questions = (found[name] for name in ("logits", "orders", "questions"))
    rows: Rows = [
        ["alias", "set", "accuracy", "", "", *(f"{o}, KL" for o in ORDERS), "most changed question"]
    ]
    for i in _most_changed(logits):
        one = logits.isel(example=i)
        asked = questions.isel(row=questions["example_id"].values == task.alias(int(one["integer"])))
        most = asked.isel(row=int(asked["kl"].values.argmax()))
        words = f"{_asked(task, str(most['row'].item()))} {int(most['prediction_before'])} → "
        words += f"{int(most['prediction_after'])} (right: {int(most['target'])})"
        by_order = [float(orders["kl"].isel(example=i).sel(direction=o)) for o in ORDERS]
        label, name = str(one["example"].item()), str(one["set"].item())
        rows.append([label, name, *_change(one, "accuracy"), *by_order, words])
    return rows


def _contrast_rows(logits: xr.Dataset) -> Rows:
    rows: Rows = [["contrast", "accuracy", "", "", "loss (nat)", "", "", "KL (nat)"]]
    for i in _most_changed(logits):
        one = logits.isel(example=i)
        changes = [*_change(one, "accuracy"), *_change(one, "loss")]
        rows.append([str(one["example"].item()), *changes, float(one["kl"])])
    return rows


def _most_changed(logits: xr.Dataset) -> list[int]:
    """Places of the examples by the change of their accuracy, then by KL."""
    change = np.abs(logits["accuracy_after"].values - logits["accuracy_before"].values)
    return [int(i) for i in np.lexsort((-logits["kl"].values, -change))[:SHOWN]]


def _asked(task: AliasTask, label: str) -> str:
    """`A7 2 =` from the label of a row."""
    left, right, *_ = map(int, label.partition(": ")[2].split())
    return " ".join(f"A{t - task.modulus}" if t >= task.modulus else str(t) for t in (left, right)) + " ="


def _top(dataset: xr.Dataset, by: str, shown: Sequence[str], ascending: bool = False) -> Rows:
    ordered = dataset.sortby(by, ascending=ascending).isel(site=slice(SHOWN))
    rows: Rows = [["site", *shown]]
    for i in range(ordered.sizes["site"]):
        one = ordered.isel(site=i)
        rows.append([str(one["site"].item()), *(float(one[name]) for name in shown)])
    return rows


def _change(one: xr.Dataset, name: str) -> tuple[Cell, Cell, Cell]:
    """Three cells: before, an arrow, after."""
    return float(one[f"{name}_before"]), "→", float(one[f"{name}_after"])


def every_table(task: Task, found: Found) -> str:
    """Where each curve of this run changes first."""
    rows: Rows = [["curve", "first change at step", "change of the mean"]]
    curves = _gaps(found) if isinstance(task, AliasTask) else _accuracies(found)
    for name, curve in curves.items():
        event = when(curve)
        at = float(event["at"])
        rows.append([name, at if np.isnan(at) else round(at), float(event["change"])])
    relative = at_level(found["weights"], "matrices")["relative"]
    per_step = relative / (relative["step"] - relative["previous"])
    moved: Rows = [["from", "to", "site", "‖Δθ‖/‖θ‖ a step"]]
    for i in np.argsort(-per_step.max("site").values)[:SHOWN]:
        one = per_step.isel(step=i)
        site = str(one["site"].values[int(one.values.argmax())])
        moved.append([int(one["previous"]), int(one["step"]), site, float(one.max())])
    return f"{_under('change points in this run', rows)}\n\n{_under('where weights moved fastest', moved)}"


def _under(title: str, rows: Rows) -> str:
    return "\n".join([title, *aligned(rows)])


def _gaps(found: Found) -> dict[str, xr.DataArray]:
    """Between the reliable and the unreliable set of each phase."""
    alignment, accuracy = found["alignment"].sel(site="everything"), found["scores"]["accuracy"]
    known = set(map(str, accuracy["example"].values))
    gaps = {}
    for first, second in PAIRS.values():
        own = by_set(alignment, first)["own"] - by_set(alignment, second)["own"]
        gaps[f"alignment {first} − {second}"] = own
        if {first, second} <= known:
            gap = accuracy.sel(example=first) - accuracy.sel(example=second)
            gaps[f"accuracy {first} − {second}"] = gap
    return gaps


def _accuracies(found: Found) -> dict[str, xr.DataArray]:
    """Of each set that training is watched on."""
    accuracy = found["scores"]["accuracy"]
    return {f"accuracy {name}": accuracy.sel(example=name) for name in map(str, accuracy["example"].values)}
