"""Checkpoints of a run side by side: two of them, or every one with its neighbour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr

from checkpoints import Checkpoint, Trajectory, TrajectoryError
from dynamics import plots, results, sites, steps, tasks
from dynamics.batch import Batch, concatenate
from dynamics.comparison import (
    align_gradients,
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
from dynamics.studies.comparison_tables import PAIRS, at_level, by_set, every_table, pair_table
from dynamics.sweeps.digests import digest
from dynamics.tasks import AliasTask, Task
from dynamics.tasks.probes import ORDERS

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
        TrajectoryError: the run was imported, or nothing is stored before a step.
        ConfigError: a step lies after the run's last, or the run's config names no task.
    """
    parts = _Parts.of(run)

    def computed() -> Found:
        first, second = (_at(parts, step) for step in (before, after))
        return {**parts.compared(first, second), **_answers(parts.task, parts.recipe, first, second)}

    folders = _folders(run, f"compare-{before}-{after}")
    found = _kept(run, folders[0], computed)
    _draw(
        folders[1],
        {"moved": plots.moved(at_level(found["weights"], "matrices"), found["logits"])},
        found["weights"],
    )
    return Compared(found, pair_table(parts.task, found, before, after), *folders)


def compare_every(run: Trajectory, chosen: Sequence[int] | None = None) -> Compared:
    """Every checkpoint of a run: curves over training, and each with its neighbour.

    Writes RUN/results/compare-every-N-HASH/*.h5 (the hash is of the steps) and figures beside them as
    `compare_pair` does. Datasets that are there are read, not computed again.

    Args:
        run: the run.
        chosen: at least three rising steps, stored or not; None takes all that are stored.

    Raises:
        TrajectoryError: the run was imported, or nothing is stored before a step.
        ConfigError: a step lies after the run's last, or the run's config names no task.
    """
    parts = _Parts.of(run)
    taken = list(run.steps if chosen is None else chosen)
    if len(taken) < 3:
        raise TrajectoryError(f"found {len(taken)} steps of {run.path}; neighbours' updates need at least 3.")
    folders = _folders(run, f"compare-every-{len(taken)}-{digest(taken)[:8]}")
    found = _kept(run, folders[0], lambda: _along(parts, taken))
    _draw(folders[1], _maps(parts.task, found), found["weights"])
    return Compared(found, every_table(parts.task, found), *folders)


@dataclass(frozen=True)
class _Parts:
    """A run and what is compared in it."""

    run: Trajectory
    task: Task
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
        questions, _ = _questions(task)
        model, like = recipe.model, next(iter(questions.values()))
        globs = ("blocks.*.hook_*_out", "blocks.*.hook_resid_post")
        outputs = [s for glob in globs for s in sites.activations(model, glob, ("layer", "pos"), like)]
        patterns = [
            replace(site, label=f"L{site.coords['layer']}H{site.coords['head']}")
            for site in sites.activations(model, "*hook_pattern", ("layer", "head"), like)
        ]
        weights = [s for level in ("layers", "heads", "matrices") for s in sites.LEVELS[level](model)]
        return cls(run, task, recipe, weights, outputs, patterns)

    def compared(self, before: Checkpoint, after: Checkpoint) -> Found:
        """Two checkpoints: weights, each example's answers, activations and patterns; and the sets' answers."""
        batches, coords = _questions(self.task)
        found = compare(
            before, after, self.recipe, batches, self.weights, coords, self.outputs, self.patterns
        )
        return {**found, "sets": compare_logits(before, after, self.recipe, self.task.evaluation)}


def _questions(task: Task) -> tuple[dict[str, Batch], dict[str, list[Any]]]:
    """What is asked about each example, and its coordinates: an alias's questions, or a contrast's probe."""
    if isinstance(task, AliasTask):
        return tasks.alias_questions(task)
    contrasts = task.contrasts()
    names = [name for name in contrasts[0].coords if name != "example"]
    batches = {str(contrast.coords["example"]): contrast.probe for contrast in contrasts}
    return batches, {name: [contrast.coords[name] for contrast in contrasts] for name in names}


def _at(parts: _Parts, step: int) -> Checkpoint:
    return steps.reach(parts.recipe, parts.run, step, parts.task.batch)


def _answers(task: Task, recipe: Recipe, before: Checkpoint, after: Checkpoint) -> Found:
    """Each alias's answers in both orders of question, and every single question's prediction."""
    if not isinstance(task, AliasTask):
        return {}
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
    questions, coords = _questions(task)

    def of_aliases(state: Checkpoint, task: AliasTask) -> Found:
        groups = align_groups(recipe, state, tasks.as_trained(task), aligned)
        return {
            "aliases": score(recipe, state, questions, coords),
            "roles": head_roles(recipe, state, tasks.head_roles(task), parts.patterns),
            "alignment": relations(groups),
            "alignment-other-tag": relations(groups, "source"),
        }

    def of_contrasts(state: Checkpoint) -> Found:
        return {
            "contrasts": score(recipe, state, questions, coords),
            "alignment": align_gradients(recipe, state, task.contrasts(), aligned),
        }

    def curves(state: Checkpoint) -> Found:
        found = {"scores": score(recipe, state, task.evaluation)}
        found |= of_aliases(state, task) if isinstance(task, AliasTask) else of_contrasts(state)
        if state.step < task.config.phases.starts["end"]:
            found["sizes"] = step_sizes(recipe, state, task.batch(state.step), components)
        return found

    def updates(start: Checkpoint, middle: Checkpoint, end: Checkpoint) -> Found:
        return {"updates": compare_updates(start, middle, end, recipe, parts.weights)}

    return over_training({1: curves, 2: parts.compared, 3: updates}, run, taken, recipe, task.batch)


# --- files ------------------------------------------------------------------------------------------------


def _folders(run: Trajectory, name: str) -> tuple[Path, Path]:
    return run.path / "results" / name, run.path / "figures" / name


def _kept(run: Trajectory, folder: Path, compute: Callable[[], Found]) -> Found:
    """The Datasets of a folder, computed and saved where there are none."""
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        for name, dataset in compute().items():
            path = partial / f"{name}.h5"
            path.unlink(missing_ok=True)
            results.save(dataset, path)
        partial.rename(folder)
    under = str(folder.relative_to(run.path))
    return {path.stem: results.load(path) for path in results.files_of(run.path, under)}


def _draw(folder: Path, figures: plots.Figures, dataset: xr.Dataset) -> None:
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.png", {"provenance": dataset.attrs["provenance"]})


def _maps(task: Task, found: Found) -> plots.Figures:
    """Site x step maps under the accuracies, and curves: of both phases of the alias task, of a language's sets."""
    maps = {
        "weights": (at_level(found["weights"], "matrices"), "relative"),
        "updates": (at_level(found["updates"], "matrices"), "cosine"),
        "step-sizes": (found["sizes"], "relative_update"),
        "effective-steps": (found["sizes"], "effective_step"),
        "activations": (found["activations"], "cka"),
        "patterns": (found["patterns"], "divergence"),
        **(_maps_of_aliases(found) if isinstance(task, AliasTask) else _maps_of_contrasts(found)),
    }
    figures = {name: plots.map_under_accuracies(*what, found["scores"]) for name, what in maps.items()}
    columns = _columns(task, found)
    if columns:
        figures["curves"] = plots.event_curves(columns)
    return figures


def _maps_of_aliases(found: Found) -> dict[str, tuple[xr.Dataset, str]]:
    gap = by_set(found["alignment"], "Dt3") - by_set(found["alignment"], "Df4")
    roles = {
        f"role-{role.replace(' ', '-')}": (found["roles"].sel(measure=role), "attention")
        for role in map(str, found["roles"]["measure"].values)
    }
    own = gap["own"].assign_attrs(long_name="alignment, Dt3 − Df4")
    return {**roles, "alignment": (gap.assign(own=own), "own")}


def _maps_of_contrasts(found: Found) -> dict[str, tuple[xr.Dataset, str]]:
    return {"alignment": (found["alignment"][["source"]].mean("example", keep_attrs=True), "source")}


def _columns(task: Task, found: Found) -> dict[str, list[plots.Panel]]:
    """The curves' columns: X1 and X2 where they have steps enough, or the whole run of a language."""
    if isinstance(task, AliasTask):
        return {name.upper(): panels for name in ("x1", "x2") if (panels := _panels(task, found, name))}
    scores = found["scores"]
    names = list(map(str, scores["example"].values))
    curves = {
        words: {name: scores[key].sel(example=name, drop=True) for name in names}
        for key, words in (("accuracy", "accuracy"), ("correct_logit", "correct logit"))
    }
    return {"": [(xr.Dataset(each, attrs={"long_name": words}), {}) for words, each in curves.items()]}


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
        name: by_set(alignment, name)["own"].reset_coords(drop=True) for name in pair
    }
    return [
        (xr.Dataset(two, attrs={"long_name": words}), {"the gap changes": when(two[pair[0]] - two[pair[1]])})
        for words, two in curves.items()
    ]
