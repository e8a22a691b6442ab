"""What a sweep consists of: its units of work, and how their results make one Dataset."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from checkpoints import Checkpoint, Trajectory
from checkpoints.rng import replayed
from dynamics import measures, results, tasks
from dynamics.measures import Measure
from dynamics.recipe import Contrast
from dynamics.results.provenance_json import paths_taken
from dynamics.sites import Site
from dynamics.sweeps.digests import digest
from dynamics.sweeps.errors import SweepError
from dynamics.sweeps.units import Question, State, Task, Unit, Verb, in_words

UNIT_REPLAYS = 256
"""Contrasts times sites of a unit of work, as near as whole contrasts come: about a second of the toy. A constant,
since what is kept of a sweep is kept by unit."""

Seed = int | str
Cell = tuple[Seed, int, int | None, str]
Runs = Trajectory | Sequence[Trajectory] | Mapping[int, Trajectory] | Mapping[str, Trajectory]
Contrasts = Sequence[Contrast] | Callable[[Any, int], Sequence[Contrast]]
Sites = Sequence[Site] | Callable[[nn.Module], Sequence[Site]]

_MISSING: dict[str, Any] = {"i": -1, "u": -1, "f": np.nan, "U": ""}
"""What an example has where others have an integer, a float or a string, as in `results`."""


def of_config(run: Trajectory) -> tasks.Task:
    """The task a run of this package was trained on, rebuilt from its config."""
    if "imported" in run.provenance:
        raise SweepError(f"{run.path} was imported: say with task_of= how its steps are taken.")
    if "task" not in run.config:
        raise SweepError(
            f"{run.path} is of no task of this package: its config has the keys {sorted(run.config)}. Say with "
            "task_of= how its steps are taken: a function of the run, whose result has recipe() and batch(step)."
        )
    return tasks.load(run.config)


def as_stored(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself."""
    return checkpoint


@dataclass(frozen=True)
class Plan:
    """A sweep before anything is computed.

    Attributes:
        questions: what is asked of each run, by seed.
        steps, source_steps, states: at which steps, from which others (None where of one checkpoint) and in which
            optimizer states (by name) it is asked.
        cells: the units of work of each (seed, step, source step, state): its contrasts in order.
        dims: which of "seed", "optimizer", "step" and "source_step" the Dataset has.
        labels: of the examples where the runs' or steps' own differ; empty where they agree.
    """

    questions: Mapping[Seed, Question]
    steps: tuple[int, ...]
    source_steps: tuple[int | None, ...]
    states: Mapping[str, State]
    cells: Mapping[Cell, tuple[Unit, ...]]
    dims: frozenset[str]
    labels: tuple[str, ...]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units of work, those of one checkpoint side by side."""
        return tuple(unit for cell in self.cells.values() for unit in cell)

    @property
    def replays(self) -> int:
        """Examples times sites, over all steps, states and runs."""
        return sum(unit.replays for unit in self.units)

    @property
    def verb(self) -> str:
        """The verb in words, with its settings."""
        return in_words(self._question.verb)

    @cached_property
    def name(self) -> str:
        """What files of this sweep are called: its verb, and a hash of everything asked."""
        units = {key: [unit.identity for unit in cell] for key, cell in self.cells.items()}
        return f"{self.verb.partition('(')[0]}-{digest(units, sorted(self.dims))[:12]}"

    @property
    def words(self) -> dict[str, Any]:
        """What is asked, as plain data."""
        first = next(iter(self.cells.values()))
        return {
            "verb": self.verb,
            "runs": {str(seed): str(question.run.path) for seed, question in self.questions.items()},
            "steps": list(self.steps),
            **({} if self._question.source is None else {"source_run": str(self._question.source.run.path)}),
            **({} if None in self.source_steps else {"source_steps": list(self.source_steps)}),
            "optimizers": [name or in_words(state) for name, state in self.states.items()],
            "measures": list(measures.named(self._question.measure)),
            "sites": [site.label for site in self._question.sites],
            "examples": list(self.labels or [str(c.coords["example"]) for u in first for c in u.contrasts]),
        }

    @cached_property
    def provenance(self) -> str:
        """Where all of it comes from; without a date, so that the same sweep is the same Dataset."""
        by_seed = {str(seed): question.run.config for seed, question in self.questions.items()}
        config = {"configs": by_seed} if "seed" in self.dims else {"config": self._question.run.config}
        shown = {key: value for key, value in self.words.items() if key not in ("sites", "examples")}
        facts = json.loads(results.provenance(**shown, **config))
        return json.dumps({key: fact for key, fact in facts.items() if key != "date"}, sort_keys=True)

    @property
    def _question(self) -> Question:
        return next(iter(self.questions.values()))

    def joined(self, found: Sequence[xr.Dataset]) -> xr.Dataset:
        """One Dataset of the results of all units, given in the order of `units`."""
        parts = iter(found)
        cells = {key: self._cell([next(parts) for _ in units]) for key, units in self.cells.items()}

        def along(dim: str, values: Sequence[Any], part_of: Callable[[Any], xr.Dataset]) -> xr.Dataset:
            datasets = [part_of(value) for value in values]
            if dim == "step" and dim in datasets[0].dims:
                return results.joined(datasets) if dim in self.dims else datasets[0]
            return results.concat(datasets, dim, values) if dim in self.dims else datasets[0]

        def of_step(seed: Seed, state: str, step: int) -> xr.Dataset:
            return along("source_step", self.source_steps, lambda source: cells[seed, step, source, state])

        def of_state(seed: Seed, state: str) -> xr.Dataset:
            return along("step", self.steps, lambda step: of_step(seed, state, step))

        def of_run(seed: Seed) -> xr.Dataset:
            return along("optimizer", list(self.states), lambda state: of_state(seed, state))

        paths = paths_taken(json.loads(part.attrs.get("provenance", "{}")) for part in found)
        facts = json.dumps({**json.loads(self.provenance), **paths}, sort_keys=True)
        return along("seed", list(self.questions), of_run).assign_attrs(provenance=facts)

    def _cell(self, parts: Sequence[xr.Dataset]) -> xr.Dataset:
        """The results of one cell's units, one after another along `example`."""
        found = xr.concat(
            parts,
            "example",
            data_vars="minimal",
            coords="minimal",
            compat="equals",
            join="exact",
            combine_attrs="override",
        )
        if not self.labels:
            return found
        own = found["example"].values
        return found.assign_coords(example=("example", list(self.labels)), label=("example", own))


def plan(
    verb: Verb,
    runs: Runs,
    steps: int | Sequence[int],
    contrasts: Contrasts,
    sites: Sites,
    measure: Measure | Mapping[str, Measure],
    state: State | Mapping[str, State] = as_stored,
    task_of: Callable[[Trajectory], Task] = of_config,
    source_steps: int | Sequence[int] | None = None,
    source_run: Trajectory | None = None,
) -> Plan:
    """What a sweep would do; nothing is computed yet.

    Args, Raises: as `sweep`.
    """
    by_seed = _by_seed(runs)
    chosen = _as_steps(steps)
    sources: tuple[int | None, ...] = (None,) if source_steps is None else _as_steps(source_steps)
    states: dict[str, State] = dict(state) if isinstance(state, Mapping) else {"": state}
    _expect_some(runs=by_seed, steps=chosen, source_steps=sources, states=states)
    _expect_different("step", chosen)
    _expect_different("source step", sources)
    several = {
        "seed": not isinstance(runs, Trajectory),
        "step": not isinstance(steps, int | np.integer),
        "source_step": source_steps is not None and not isinstance(source_steps, int | np.integer),
        "optimizer": isinstance(state, Mapping),
    }
    dims = frozenset(dim for dim, is_dim in several.items() if is_dim)
    threads = torch.get_num_threads()
    questions: dict[Seed, Question] = {}
    cells: dict[Cell, tuple[Unit, ...]] = {}
    given = _source_run(source_run, source_steps)
    with replayed(None):
        for seed, run in by_seed.items():
            expect_steps(run, chosen)
            expect_steps(given or run, [source for source in sources if source is not None])
            task = task_of(run)
            of_run = tuple(sites(task.recipe().model) if callable(sites) else sites)
            _expect_some(sites=of_run)
            asked_of = partial(
                Question,
                verb=verb,
                task_of=task_of,
                sites=of_run,
                measure=measure,
                dims=dims,
                threads=threads,
            )
            other = None if given is None else asked_of(uuid.uuid4().hex, run=given)
            question = questions[seed] = asked_of(uuid.uuid4().hex, run=run, source=other)
            for step in chosen:
                labelled = _labelled(contrasts(task, step) if callable(contrasts) else contrasts)
                groups = _groups(labelled, len(of_run))
                for source, (name, function) in product(sources, states.items()):
                    units = (Unit(question, step, function, group, source) for group in groups)
                    cells[seed, step, source, name] = tuple(units)
    _expect_alike([(seed, [(s.label, s.coords) for s in q.sites]) for seed, q in questions.items()])
    return Plan(questions, chosen, sources, states, cells, dims, _common_labels(cells))


def _source_run(run: Trajectory | None, steps: int | Sequence[int] | None) -> Trajectory | None:
    """The other run that source checkpoints are of, opened by absolute path."""
    if run is not None and steps is None:
        raise SweepError(
            "the sweep was given a source_run without source_steps; name the steps of it as well."
        )
    return None if run is None else Trajectory.open(run.path.resolve())


def _as_steps(steps: int | Sequence[int]) -> tuple[int, ...]:
    return (int(steps),) if isinstance(steps, int | np.integer) else tuple(int(step) for step in steps)


def _by_seed(runs: Runs) -> dict[Seed, Trajectory]:
    """The runs by their label along `seed`, opened by absolute path: a worker may stand in another folder."""
    if isinstance(runs, Trajectory):
        by_seed: dict[Any, Trajectory] = {0: runs}
    elif isinstance(runs, Mapping):
        by_seed = dict(runs)
    else:
        seeds = [run.config.get("seed") for run in runs]
        if None in seeds or len(set(seeds)) < len(seeds):
            raise SweepError(
                f"the runs' configs have the seeds {seeds}, which do not tell them apart. Give the runs as a "
                "dict by label: {'drawn': run, 'exchanged': other}."
            )
        by_seed = dict(zip(seeds, runs, strict=True))
    return {seed: Trajectory.open(run.path.resolve()) for seed, run in by_seed.items()}


def _expect_some(**given: Any) -> None:
    for name, values in given.items():
        if not values:
            raise SweepError(f"the sweep was given no {name}; it needs at least one.")


def _expect_different(what: str, labels: Sequence[Any]) -> None:
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise SweepError(
            f"the sweep was given {what} {repeated[0]!r} more than once; a result is read by its labels."
        )


def expect_steps(run: Trajectory, steps: Sequence[int]) -> None:
    """Raise a SweepError unless the steps lie within a run's checkpoints."""
    first, last = (run.steps[0], run.steps[-1]) if run.steps else (0, -1)
    if outside := [step for step in steps if not first <= step <= last]:
        raise SweepError(
            f"step {outside[0]} is not a step of {str(run.path)!r}, whose checkpoints go from {first} to {last}."
        )


def _expect_alike(sites: Sequence[tuple[Seed, Any]]) -> None:
    (first, expected), *others = sites
    for seed, found in others:
        if found != expected:
            raise SweepError(
                f"run {seed!r} has other sites than run {first!r}, and one Dataset has one list of sites. "
                "Sweep the runs one by one, or name sites that all of them have."
            )


def _labelled(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """The contrasts with all coordinates on each, as a verb fills them in where it is given all at once."""
    _expect_some(contrasts=contrasts)
    rows = [{"example": f"contrast {i}", **c.coords} for i, c in enumerate(contrasts)]
    columns = {name: value for row in reversed(rows) for name, value in row.items()}
    missing: dict[str, Any] = {
        name: _MISSING.get(np.asarray(value).dtype.kind) for name, value in columns.items()
    }
    _expect_different("example", [row["example"] for row in rows])
    return [replace(c, coords={**missing, **row}) for c, row in zip(contrasts, rows, strict=True)]


def _groups(contrasts: Sequence[Contrast], n_sites: int) -> list[tuple[Contrast, ...]]:
    """Neighbouring contrasts that make a unit of work, in groups as equal as may be."""
    size = max(1, UNIT_REPLAYS // n_sites)
    n_groups = -(-len(contrasts) // size)
    return [tuple(contrasts[i] for i in part) for part in np.array_split(np.arange(len(contrasts)), n_groups)]


def _common_labels(cells: Mapping[Cell, Sequence[Unit]]) -> tuple[str, ...]:
    """Empty if all cells have the same examples; otherwise labels by their place in the list.

    Raises:
        SweepError: the cells differ in the number of their examples, or in what is known of them.
    """
    coords = {key: [c.coords for unit in units for c in unit.contrasts] for key, units in cells.items()}
    (first, expected), *others = coords.items()
    for key, found in others:
        if len(found) != len(expected) or found[0].keys() != expected[0].keys():
            ours, theirs = (f"{len(rows)} contrasts with {sorted(rows[0])}" for rows in (found, expected))
            raise SweepError(
                f"run {key[0]!r} has at step {key[1]} {ours}; expected, as of run {first[0]!r} at step {first[1]}, "
                f"{theirs}."
            )
    labels = {tuple(row["example"] for row in rows) for rows in coords.values()}
    return () if len(labels) == 1 else tuple(f"example {i}" for i in range(len(expected)))
