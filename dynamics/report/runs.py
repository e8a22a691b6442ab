"""What a report is made of: a run's curves, checkpoints and files of results, read and not changed."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from checkpoints import Trajectory
from dynamics import results, tasks
from dynamics.config import read, task_name
from dynamics.tasks import AliasTask

SHARDS = "shards"
"""Folder of parts of results, which a sweep joins into one."""

QUANTITIES = {"accuracy": ("share of rows answered right", "share"), "loss": ("mean −log p(target)", "nat")}
"""Ends of the columns of metrics.csv that there are for each set of questions."""


@dataclass(frozen=True)
class Result:
    """A Dataset and the file it stands in."""

    path: Path
    dataset: xr.Dataset

    @property
    def facts(self) -> dict[str, Any]:
        """Its provenance; empty where it has none."""
        found: dict[str, Any] = json.loads(str(self.dataset.attrs.get("provenance") or "{}"))
        return found

    @property
    def verb(self) -> str:
        """What found it, such as "patch_gradients"; of a file that does not say, its name."""
        return str(self.facts.get("verb") or self.facts.get("quantity") or self.path.stem)


@dataclass(frozen=True)
class Run:
    """One run, as far as its folder holds it.

    Attributes:
        folder: where it is.
        config: as its manifest has it; empty where a loop of one's own kept none.
        provenance: likewise.
        steps: of its checkpoints.
        phases: name -> first step, and under "end" the step after the last; empty where they are not known.
        guesses: label -> the accuracy of a guess.
        curves: `accuracy` and `loss` [step, example], an example for each set of questions; None without metrics.
        results: its files of results, in the order of their names.
    """

    folder: Path
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    steps: tuple[int, ...]
    phases: Mapping[str, int]
    guesses: Mapping[str, float]
    curves: xr.Dataset | None
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.resolve().name


def open_run(folder: Path, beside: Sequence[Path] = ()) -> Run:
    """Read a run and its results.

    Args:
        folder: of the run; results are read from its folder `results`.
        beside: further files or folders of results.

    Raises:
        TrajectoryError: it holds no run.
        ResultsError: a file of results is damaged.
        FileNotFoundError: there is no file or folder of that name.
    """
    trajectory = Trajectory.open(folder)
    known = task_name(trajectory.config) is not None
    task = tasks.load(trajectory.config) if known else None
    metrics = trajectory.read_file("metrics.csv") if (trajectory.path / "metrics.csv").is_file() else None
    own = [path for path in results.files_of(folder) if SHARDS not in path.relative_to(folder).parts]
    files = [*own, *(path for place in beside for path in _files(place))]
    return Run(
        folder,
        trajectory.config,
        trajectory.provenance,
        tuple(trajectory.steps),
        read(trajectory.config).phases.starts if known else {},
        task.chance() if isinstance(task, AliasTask) else {},
        None if metrics is None else curves(pd.read_csv(io.BytesIO(metrics))),
        tuple(Result(path, results.load(path)) for path in files),
    )


def _files(place: Path) -> list[Path]:
    """Files of results at or below a place, without the parts that a sweep has joined."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FileNotFoundError(f"there is no file or folder of results {place}.")
    return [path for path in sorted(place.rglob("*.h5")) if SHARDS not in path.relative_to(place).parts]


def curves(metrics: pd.DataFrame) -> xr.Dataset | None:
    """Columns `SET_accuracy` and `SET_loss` over `step` as a Dataset [step, example]; None where there are none.

    Rows at which nothing of the kind was measured are left out.
    """
    found: dict[str, xr.DataArray] = {}
    for quantity, (words, units) in QUANTITIES.items():
        names = [str(name) for name in metrics.columns if str(name).endswith(f"_{quantity}")]
        names = [name for name in names if name != f"train_{quantity}"]
        if names and "step" in metrics.columns:
            rows = (
                metrics[["step", *names]]
                .dropna(how="all", subset=names)
                .groupby("step", as_index=False)
                .last()
            )
            labels = [name.removesuffix(f"_{quantity}") for name in names]
            found[quantity] = xr.DataArray(
                rows[names].to_numpy(np.float64),
                {"step": rows["step"].to_numpy(np.int64), "example": labels},
                ("step", "example"),
                attrs={"long_name": words, "units": units},
            )
    return xr.Dataset(found) if found else None
