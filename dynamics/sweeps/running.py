"""sweep: any verb over checkpoints, contrasts and runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import xarray as xr
from tqdm.auto import tqdm

from checkpoints import Trajectory
from dynamics import results
from dynamics.engine.progress import SECONDS_BEFORE_PROGRESS
from dynamics.measures import Measure
from dynamics.sweeps import shards, working
from dynamics.sweeps.errors import SweepError
from dynamics.sweeps.planning import Contrasts, Plan, Runs, Sites, as_stored, of_config, plan
from dynamics.sweeps.units import State, Task, Unit, Verb, forget

logger = logging.getLogger(__name__)


def sweep(
    verb: Verb,
    runs: Runs,
    steps: int | Sequence[int],
    contrasts: Contrasts,
    sites: Sites,
    measure: Measure | Mapping[str, Measure],
    *,
    source_steps: int | Sequence[int] | None = None,
    source_run: Trajectory | None = None,
    state: State | Mapping[str, State] = as_stored,
    task_of: Callable[[Trajectory], Task] = of_config,
    out: str | os.PathLike[str] | None = None,
    workers: int = 0,
    scheduler: Any = None,
) -> xr.Dataset:
    """Call a verb at every step of every run, and make one Dataset of what it finds.

    The same call gives the same Dataset to the bit, attributes included, in this process or by any number of
    workers on such machines: each unit of work is computed with as many threads as its run was trained with.

    Args:
        verb: any function (recipe, checkpoint, contrasts, sites, measure) -> Dataset with a dim `example`, such as
            the package's; its settings by `functools.partial(patch_signals, forward="source")`.
        runs: a run; or several, which makes a dim `seed`: a list, labelled by the seeds in their configs, or a dict
            by label.
        steps: a step; or several, which makes a dim `step`. Those between stored checkpoints are reached by
            replaying forward.
        contrasts: a list; or a function (task, step) -> list, where they differ between runs or steps, such as
            `lambda task, step: task.contrasts()` or `AliasTask.contrasts_at`.
        sites: a list; or a function model -> list, such as `dy.sites.heads`. All runs must have the same.
        measure: as the verb takes it.
        source_steps: steps of source checkpoints; several make a dim `source_step`. The verb is
            then given a `CheckpointPair` for each step, its base, and each source step: the result is that grid.
            For `patch_parameters`, `attribute_parameters`, `patch_activations`. None gives it one checkpoint.
        source_run: another run that the source checkpoints are of, instead of each run's own: of the same
            architecture, read by `task_of` as the runs are.
        state: what is made of each checkpoint first, such as `Checkpoint.with_fresh_optimizer`; or a dict of those
            by name, which makes a dim `optimizer`.
        task_of: run -> task, by default the run's own, from its config. For other runs any class or function whose
            result has `recipe()` and, for steps that are not stored, `batch(step)`. Workers call it themselves,
            so what it makes need not be picklable.
        out: a folder where the result of each unit of work is kept as soon as it is there. The same call after a
            crash computes only what is missing; another question finds nothing that is not its own. None keeps
            everything in memory.
        workers: processes to start on this machine; 0 works in this one. They need the extra `[dask]`.
        scheduler: a running dask cluster instead: its address, its scheduler file, or a cluster object. With
            `out` a folder that its workers see too.

    Returns:
        What the verb returns, with dims `seed`, `optimizer`, `step`, `source_step` in front, as far as several were
        given. Where
        runs or steps have examples of different names (other seeds draw other aliases), `example` says "example 0",
        "example 1", ... by their place in the list, and their own names are a coordinate `label`.

    Raises:
        SweepError: something is missing, double, or differs between runs; before anything is computed.
        TrajectoryError: a checkpoint cannot be read.
        KeyboardInterrupt: what was kept in `out` stays, and the same call goes on from there.
    """
    asked = plan(verb, runs, steps, contrasts, sites, measure, state, task_of, source_steps, source_run)
    return run(asked, out, workers, scheduler)


def run(
    asked: Plan, out: str | os.PathLike[str] | None = None, workers: int = 0, scheduler: Any = None
) -> xr.Dataset:
    """Carry out a plan.

    Args, Returns, Raises: as `sweep`.
    """
    if workers < 0 or (workers and scheduler is not None):
        raise SweepError(
            f"found workers={workers} and scheduler={scheduler!r}; expected a number of processes to start here, "
            "or a cluster that is running."
        )
    _ = asked.provenance  # what cannot be written down is said before anything is computed
    folder = None if out is None else Path(out).resolve()
    if folder is not None:
        shards.describe(asked, folder)
    jobs: list[working.Job] = [
        (number, unit, None if folder is None else shards.shard(folder, unit))
        for number, unit in enumerate(asked.units)
    ]
    todo = [(n, unit, path) for n, unit, path in jobs if path is None or not path.exists()]
    for other in shards.answered_otherwise(asked, folder) if folder and todo else ():
        logger.warning(
            "%s was asked in the same words, of other code, versions or data: its shards are not used, and what is "
            "asked now is computed anew. Delete it and them if they are of no more use.",
            other,
        )
    found: dict[int, xr.Dataset] = {}
    try:
        with _progress(asked, todo) as bar, _way(todo, workers, scheduler) as done:
            for number, dataset in done:
                if dataset is not None:
                    found[number] = dataset
                bar.update(asked.units[number].replays)
        return asked.joined([found[n] if n in found else _kept(path, unit) for n, unit, path in jobs])
    finally:
        forget()


def _kept(path: Path | None, unit: Unit) -> xr.Dataset:
    """What a file keeps of a unit; one that is damaged is computed and written again."""
    assert path is not None, "what no file keeps was found just now"
    try:
        return results.load(path)
    except results.ResultsError as error:
        logger.warning("%s It is computed again.", error)
        again = unit.compute()
        results.save(again, path, overwrite=True)
        return again


def _progress(asked: Plan, todo: Sequence[working.Job]) -> tqdm[NoReturn]:
    return tqdm(
        total=asked.replays,
        initial=asked.replays - sum(unit.replays for _, unit, _ in todo),
        desc=f"sweep {asked.verb}",
        unit="replay",
        delay=SECONDS_BEFORE_PROGRESS,
    )


@contextmanager
def _way(todo: Sequence[working.Job], workers: int, scheduler: Any) -> Iterator[Iterator[working.Done]]:
    """The units of work as they are done: here, or by workers where there is work for them."""
    if not todo or (not workers and scheduler is None):
        yield working.serially(todo)
        return
    with working.connected(scheduler) if workers == 0 else working.local(workers) as client:
        yield working.by_workers(todo, client)
