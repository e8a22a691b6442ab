"""Checkpoints of an alias run side by side: two of them, or every one with its neighbour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from checkpoints import Checkpoint, Trajectory, TrajectoryError
from dynamics import plots, results, sites, steps, tasks
from dynamics.batch import concatenate
from dynamics.comparison import (
    align_groups,
    compare,
    compare_logits,
    compare_rows,
    compare_updates,
    head_roles,
    over_training,
    relations,
    score,
    step_sizes,
    when,
)
from dynamics.recipe import Recipe
from dynamics.sites import Site
from dynamics.sweeps.digests import digest
from dynamics.tasks import AliasTask
from dynamics.tasks.probes import ORDERS

SHOWN = 10
"""Rows of a table."""

Found = dict[str, xr.Dataset]


@dataclass(frozen=True)
class Compared:
    """What a comparison came to: Datasets by name, the same in words, and the folders of Datasets and figures."""

    found: Found
    table: str
    results: Path
    figures: Path


def compare_pair(run: Trajectory, before: int, after: int) -> Compared:
    """Two steps of a run, stored or reached by replaying: what changed in weights, answers, attention, activations.

    Writes RUN/results/compare-BEFORE-AFTER/*.h5 and RUN/figures/compare-BEFORE-AFTER/moved.png. Datasets that are
    there are read, not computed again.

    Raises:
        TrajectoryError: the run was imported, or a step lies outside it.
    """
    parts = _Parts.of(run)

    def computed() -> Found:
        first, second = (_at(parts, step) for step in (before, after))
        return {**parts.compared(first, second), **_answers(parts.task, parts.recipe, first, second)}

    folders = _folders(run, f"compare-{before}-{after}")
    found = _kept(folders[0], computed)
    _draw(
        folders[1],
        {"moved": plots.moved(_level(found["weights"], "matrices"), found["logits"])},
        found["weights"],
    )
    return Compared(found, _pair_table(parts.task, found, before, after), *folders)


def compare_every(run: Trajectory, chosen: Sequence[int] | None = None) -> Compared:
    """Every checkpoint of a run: curves over training, and each with its neighbour.

    Writes RUN/results/compare-every-N-HASH/*.h5 (the hash is of the steps) and figures beside them as
    `compare_pair` does. Datasets that are there are read, not computed again.

    Args:
        run: the run.
        chosen: at least three rising steps, stored or not; None takes all that are stored.

    Raises:
        TrajectoryError: the run was imported, or a step lies outside it.
    """
    parts = _Parts.of(run)
    taken = list(run.steps if chosen is None else chosen)
    if len(taken) < 3:
        raise TrajectoryError(f"found {len(taken)} steps of {run.path}; neighbours' updates need at least 3.")
    folders = _folders(run, f"compare-every-{len(taken)}-{digest(taken)[:8]}")
    found = _kept(folders[0], lambda: _along(parts, taken))
    _draw(folders[1], _maps(parts.task, found), found["weights"])
    return Compared(found, _every_table(parts.task, found), *folders)


@dataclass(frozen=True)
class _Parts:
    """A run and what is compared in it."""

    run: Trajectory
    task: AliasTask
    recipe: Recipe
    weights: list[Site]
    outputs: list[Site]
    patterns: list[Site]

    @classmethod
    def of(cls, run: Trajectory) -> _Parts:
        if "imported" in run.provenance:
            raise TrajectoryError(
                f"{run.path} was imported, so its task is not known. dy.compare(before, after, recipe, batches, "
                "sites) compares its checkpoints with a recipe and batches of your own."
            )
        task = tasks.load(run.config)
        recipe = task.recipe()
        model, like = recipe.model, task.questions(task.sets["Dt3"][0])
        globs = ("blocks.*.hook_*_out", "blocks.*.hook_resid_post")
        outputs = [s for glob in globs for s in sites.activations(model, glob, ("layer", "pos"), like)]
        patterns = [
            replace(site, label=f"L{site.coords['layer']}H{site.coords['head']}")
            for site in sites.activations(model, "*hook_pattern", ("layer", "head"), like)
        ]
        weights = [s for level in ("layers", "heads", "matrices") for s in sites.LEVELS[level](model)]
        return cls(run, task, recipe, weights, outputs, patterns)

    def compared(self, before: Checkpoint, after: Checkpoint) -> Found:
        """Two checkpoints: weights, each alias's answers, activations and patterns; and the sets' answers."""
        batches, coords = tasks.alias_questions(self.task)
        found = compare(
            before, after, self.recipe, batches, self.weights, coords, self.outputs, self.patterns
        )
        return {**found, "sets": compare_logits(before, after, self.recipe, self.task.evaluation)}


def _at(parts: _Parts, step: int) -> Checkpoint:
    return steps.reach(parts.recipe, parts.run, step, parts.task.batch)


def _answers(task: AliasTask, recipe: Recipe, before: Checkpoint, after: Checkpoint) -> Found:
    """Each alias's answers in both orders of question, and every single question's prediction."""
    batches, coords = tasks.alias_questions(task)
    by_order = [
        compare_logits(
            before, after, recipe, {n: tasks.in_order(task, b, order) for n, b in batches.items()}, coords
        )
        for order in ORDERS
    ]
    asked = [task.questions(i) for i in coords["integer"]]
    return {
        "orders": results.concat(by_order, "direction", list(ORDERS)),
        "questions": compare_rows(before, after, recipe, concatenate(asked)),
    }


def _along(parts: _Parts, taken: Sequence[int]) -> Found:
    """All quantities along training."""
    task, recipe, run = parts.task, parts.recipe, parts.run
    components = sites.components(recipe.model)
    aligned = [sites.everything(recipe.model), *components]
    contrasts, roles = tasks.as_trained(task), tasks.head_roles(task)
    aliases, coords = tasks.alias_questions(task)

    def curves(state: Checkpoint) -> Found:
        return {
            "scores": score(recipe, state, task.evaluation),
            "aliases": score(recipe, state, aliases, coords),
            "roles": head_roles(recipe, state, roles, parts.patterns),
            "alignment": relations(align_groups(recipe, state, contrasts, aligned)),
        }

    def sizes(state: Checkpoint) -> Found:
        return {"sizes": step_sizes(recipe, state, task.batch(state.step), components)}

    def updates(start: Checkpoint, middle: Checkpoint, end: Checkpoint) -> Found:
        return {"updates": compare_updates(start, middle, end, recipe, parts.weights)}

    trained = [step for step in taken if step < task.config.phases.starts["end"]]
    return {
        **over_training(curves, run, taken, recipe, task.batch),
        **over_training(sizes, run, trained, recipe, task.batch),
        **over_training(parts.compared, run, taken, recipe, task.batch, n_neighbours=2),
        **over_training(updates, run, taken, recipe, task.batch, n_neighbours=3),
    }


# --- files ------------------------------------------------------------------------------------------------


def _folders(run: Trajectory, name: str) -> tuple[Path, Path]:
    return run.path / "results" / name, run.path / "figures" / name


def _kept(folder: Path, compute: Callable[[], Found]) -> Found:
    """The Datasets of a folder, computed and saved where there are none."""
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        for name, dataset in compute().items():
            path = partial / f"{name}.h5"
            path.unlink(missing_ok=True)
            results.save(dataset, path)
        partial.rename(folder)
    return {path.stem: results.load(path) for path in sorted(folder.glob("*.h5"))}


def _draw(folder: Path, figures: Mapping[str, Figure], dataset: xr.Dataset) -> None:
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.png", {"provenance": dataset.attrs["provenance"]})


def _maps(task: AliasTask, found: Found) -> dict[str, Figure]:
    """Site x step maps under the accuracies, and the curves of both phases."""
    scores = found["scores"]
    gap = _by_set(found["alignment"], "Dt3") - _by_set(found["alignment"], "Df4")
    maps = {
        "weights": (_level(found["weights"], "matrices"), "relative"),
        "updates": (_level(found["updates"], "matrices"), "cosine"),
        "step-sizes": (found["sizes"], "relative_update"),
        "effective-steps": (found["sizes"].assign(log=_log10(found["sizes"]["effective_step"])), "log"),
        "activations": (found["activations"], "cka"),
        "patterns": (found["patterns"], "divergence"),
        **{
            f"role-{role.replace(' ', '-')}": (found["roles"].sel(measure=role), "attention")
            for role in map(str, found["roles"]["measure"].values)
        },
        "alignment": (gap.assign(own=gap["own"].assign_attrs(long_name="alignment, Dt3 − Df4")), "own"),
    }
    figures = {name: plots.map_under_accuracies(*what, scores) for name, what in maps.items()}
    columns = {name: panels for name in ("x1", "x2") if (panels := _panels(task, found, name))}
    if columns:
        figures["curves"] = plots.event_curves({name.upper(): panels for name, panels in columns.items()})
    return figures


def _log10(values: xr.DataArray) -> xr.DataArray:
    found: xr.DataArray = xr.apply_ufunc(np.log10, values)
    return found.assign_attrs(long_name=f"log10 of the {values.attrs['long_name']}")


def _panels(task: AliasTask, found: Found, phase: str) -> list[plots.Panel]:
    """Accuracy, correct logit and alignment of the phase's two sets; nothing where it has too few steps."""
    pair = PAIRS[phase]
    starts = task.config.phases.starts
    first, last = starts[phase], starts["x2" if phase == "x1" else "end"]

    def within(dataset: xr.Dataset) -> xr.Dataset:
        chosen = dataset.sel(step=[s for s in dataset["step"].values if first <= s <= last])
        return chosen.assign_coords(step=chosen["step"] - first)

    scores = within(found["scores"])
    known = set(map(str, scores["example"].values))
    if scores.sizes["step"] < 2 or not known.issuperset(pair):
        return []
    alignment = within(found["alignment"]).sel(site="everything")
    curves = {
        words: {name: scores[key].sel(example=name, drop=True) for name in pair}
        for key, words in (("accuracy", "accuracy"), ("correct_logit", "correct logit"))
    }
    curves["gradient alignment"] = {
        name: _by_set(alignment, name)["own"].reset_coords(drop=True) for name in pair
    }
    return [
        (xr.Dataset(two, attrs={"long_name": words}), {"they part": when(two[pair[0]] - two[pair[1]])})
        for words, two in curves.items()
    ]


PAIRS = {"x1": ("DtQ1", "DfQ2"), "x2": ("Dt3", "Df4")}
"""The reliable and the unreliable set that a phase is about."""


def _by_set(dataset: xr.Dataset, name: str) -> xr.Dataset:
    """The mean over the aliases of a set."""
    chosen = dataset.isel(example=dataset["set"].values == name)
    bare = chosen.drop_vars([key for key, coord in chosen.coords.items() if "example" in coord.dims])
    return bare.mean("example", keep_attrs=True)


def _level(dataset: xr.Dataset, level: str) -> xr.Dataset:
    return dataset.isel(site=dataset["level"].values == level)


# --- tables -----------------------------------------------------------------------------------------------


def _pair_table(task: AliasTask, found: Found, before: int, after: int) -> str:
    tables = {
        "answers by set": _sets_rows(found["sets"]),
        "aliases whose answers changed most": _alias_rows(task, found),
        "matrices that moved most": _top(
            _level(found["weights"], "matrices"), "relative", ("relative", "cosine")
        ),
        "heads whose attention moved most": _top(found["patterns"], "divergence", ("divergence", "moved")),
        "activations that changed most": _top(found["activations"], "cka", ("cka",), ascending=True),
    }
    return "\n\n".join(
        [f"Step {before} to {after}", *(f"{title}\n{_aligned(rows)}" for title, rows in tables.items())]
    )


def _sets_rows(found: xr.Dataset) -> list[list[str]]:
    rows = [["set", "accuracy", "loss (nat)", "KL (nat)", "predictions changed"]]
    for i, name in enumerate(map(str, found["example"].values)):
        one = found.isel(example=i)
        rows.append(
            [
                name,
                _arrow(one, "accuracy"),
                _arrow(one, "loss"),
                f"{float(one['kl']):.3g}",
                f"{float(one['changed']):.0%}",
            ]
        )
    return rows


def _alias_rows(task: AliasTask, found: Found) -> list[list[str]]:
    """The aliases by the change of their accuracy, then by KL, with both orders and the most changed question."""
    logits, orders, questions = (found[name] for name in ("logits", "orders", "questions"))
    change = np.abs(logits["accuracy_after"].values - logits["accuracy_before"].values)
    order = np.lexsort((-logits["kl"].values, -change))[:SHOWN]
    rows = [["alias", "set", "accuracy", *(f"{o}, KL" for o in ORDERS), "most changed question"]]
    for i in order:
        one = logits.isel(example=i)
        asked = questions.isel(row=questions["example_id"].values == task.alias(int(one["integer"])))
        most = asked.isel(row=int(asked["kl"].values.argmax()))
        words = f"{_asked(task, str(most['row'].item()))} {int(most['prediction_before'])} → "
        words += f"{int(most['prediction_after'])} (right: {int(most['target'])})"
        by_order = [f"{float(orders['kl'].isel(example=i).sel(direction=o)):.3g}" for o in ORDERS]
        rows.append(
            [str(one["example"].item()), str(one["set"].item()), _arrow(one, "accuracy"), *by_order, words]
        )
    return rows


def _asked(task: AliasTask, label: str) -> str:
    """`A7 2 =` from the label of a row."""
    left, right, *_ = map(int, label.partition(": ")[2].split())
    return " ".join(f"A{t - task.modulus}" if t >= task.modulus else str(t) for t in (left, right)) + " ="


def _top(dataset: xr.Dataset, by: str, shown: Sequence[str], ascending: bool = False) -> list[list[str]]:
    ordered = dataset.sortby(by, ascending=ascending).isel(site=slice(SHOWN))
    rows = [["site", *shown]]
    for i in range(ordered.sizes["site"]):
        one = ordered.isel(site=i)
        rows.append([str(one["site"].item()), *(f"{float(one[name]):.3g}" for name in shown)])
    return rows


def _arrow(one: xr.Dataset, name: str) -> str:
    return f"{float(one[f'{name}_before']):.3g} → {float(one[f'{name}_after']):.3g}"


def _every_table(task: AliasTask, found: Found) -> str:
    """Where each curve of this run changes first."""
    rows = [["curve", "first change at step", "change of the mean"]]
    alignment = found["alignment"].sel(site="everything")
    for first, second in PAIRS.values():
        gaps = {
            f"alignment {first} − {second}": _by_set(alignment, first)["own"]
            - _by_set(alignment, second)["own"]
        }
        if {first, second} <= set(map(str, found["scores"]["example"].values)):
            accuracy = found["scores"]["accuracy"]
            gaps[f"accuracy {first} − {second}"] = accuracy.sel(example=first) - accuracy.sel(example=second)
        for name, curve in gaps.items():
            event = when(curve)
            at, change = float(event["at"]), float(event["change"])
            rows.append(
                [name, "none" if np.isnan(at) else f"{at:.0f}", "" if np.isnan(at) else f"{change:+.3g}"]
            )
    relative = _level(found["weights"], "matrices")["relative"]
    per_step = relative / (relative["step"] - relative["previous"])
    moved = [["from", "to", "site", "‖Δθ‖/‖θ‖ a step"]]
    for i in np.argsort(-per_step.max("site").values)[:SHOWN]:
        one = per_step.isel(step=i)
        site = str(one["site"].values[int(one.values.argmax())])
        moved.append([str(int(one["previous"])), str(int(one["step"])), site, f"{float(one.max()):.3g}"])
    return f"change points in this run\n{_aligned(rows)}\n\nwhere weights moved fastest\n{_aligned(moved)}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )
