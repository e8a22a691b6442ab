"""Ways to get units of work done: here one after another, or by a dask cluster's workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from dynamics.sweeps.errors import SweepError
from dynamics.sweeps.shards import keep
from dynamics.sweeps.units import Unit

if TYPE_CHECKING:
    from distributed import Client

Job = tuple[int, Unit, Path | None]
"""A unit, its number in the sweep, and the file that keeps its result, if any."""

Done = tuple[int, xr.Dataset | None]
"""A unit's number and what it gave; None where a file had it already."""

AHEAD = 2
"""Tasks sent for each worker: one to work on and one to go on with."""

CHECKPOINTS_A_WORKER = 4
"""With so many checkpoints for each worker, all units of one go to one worker, which loads it once."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}
"""What local workers begin with. Memory that one step frees is kept for the next: dask's own setting gives it back
to the system at once, which took a third of the time."""

DEAF = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
"""What they run first: Ctrl-C is for the process that started them, which then ends them."""


def work(jobs: Sequence[Job]) -> list[Done]:
    """Compute units, keep and return what they give; what a file has already is not computed again."""
    done: list[Done] = []
    for number, unit, path in jobs:
        found = None if path is not None and path.exists() else unit.compute()
        if path is not None and found is not None:
            keep(found, path)
        done.append((number, found))
    return done


def _work_there(jobs: Sequence[Job]) -> list[Done]:
    """The same in a cluster's worker; xarray would otherwise lock each file it writes across the cluster."""
    import dask

    with dask.config.set(scheduler="synchronous"):
        return work(jobs)


def serially(jobs: Iterable[Job]) -> Iterator[Done]:
    """One unit after another in this process; of what files keep nothing is held meanwhile."""
    for job in jobs:
        for number, found in work([job]):
            yield number, found if job[2] is None else None


def by_workers(jobs: Sequence[Job], client: Client) -> Iterator[Done]:
    """Units as a cluster's workers finish them; a task whose worker dies is given to another.

    Only a few tasks are under way at a time, so that little is lost when the caller stops.
    """
    tasks = iter(_tasks(jobs, _n_workers(client)))

    def sent(n: int) -> list[Any]:
        return [client.submit(_work_there, task, pure=False) for task in islice(tasks, max(0, n))]

    running = _dask().as_completed(sent(AHEAD * _n_workers(client)))
    for future in running:
        yield from future.result()
        running.update(sent(AHEAD * _n_workers(client) - running.count()))


def _tasks(jobs: Sequence[Job], n_workers: int) -> list[list[Job]]:
    """Units that a worker does one after another: all those of a checkpoint, or one where that leaves some idle."""
    by_checkpoint = [list(same) for _, same in groupby(jobs, lambda job: (job[1].question, job[1].step))]
    if len(by_checkpoint) >= CHECKPOINTS_A_WORKER * n_workers:
        return by_checkpoint
    return [[job] for job in jobs]


def _n_workers(client: Client) -> int:
    return max(1, len(client.nthreads()))  # type: ignore[no-untyped-call]


@contextmanager
def local(workers: int) -> Iterator[Client]:
    """That many processes on this machine, of one thread each, for as long as they are needed."""
    dask = _dask()
    from dask import config

    with (
        config.set({"distributed.nanny.pre-spawn-environ": ENVIRONMENT}),
        dask.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=None,
            dashboard_address=None,
            scheduler_kwargs={
                "dashboard_address": "127.0.0.1:0"
            },  # two sweeps at once do not ask for one port
            preload=[DEAF],
        ) as cluster,
        dask.Client(cluster) as client,
    ):
        yield client


@contextmanager
def connected(scheduler: Any) -> Iterator[Client]:
    """A cluster that is running: by its address, its scheduler file (.json), or a dask cluster object."""
    dask = _dask()
    by_file = isinstance(scheduler, str | Path) and str(scheduler).endswith(".json")
    with dask.Client(scheduler_file=str(scheduler)) if by_file else dask.Client(scheduler) as client:
        yield client


def _dask() -> Any:
    """dask.distributed, or an error that says how to get it."""
    try:
        import distributed as dask
    except ModuleNotFoundError as error:
        raise SweepError(
            "workers need dask, which is not installed: pip install 'training-dynamics[dask]'."
        ) from error
    return dask
