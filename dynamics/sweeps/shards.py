"""What is kept of a sweep: one file for each unit of work, named by a hash of all that its numbers depend on.

    FOLDER/shards/<hash>.h5      a Dataset of one unit, as the verb returned it
    FOLDER/<sweep>.json          what was asked, in words, and which shards answer it

Several sweeps may share a folder; what they have in common is computed once.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import xarray as xr

from checkpoints import files
from dynamics import results
from dynamics.sweeps.planning import Plan
from dynamics.sweeps.units import Unit


def shard(folder: Path, unit: Unit) -> Path:
    """The file of a unit, whether it is there or not."""
    return folder / "shards" / f"{unit.identity}.h5"


def keep(found: xr.Dataset, path: Path) -> None:
    """Write a unit's result, unless another process was quicker."""
    with suppress(FileExistsError):
        results.save(found, path)


def describe(plan: Plan, folder: Path) -> None:
    """Write down beside the shards what was asked."""
    text = json.dumps({**plan.words, "shards": _contents(plan, folder)}, indent=1, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomically(folder / f"{plan.name}.json", (text + "\n").encode())


def answered_otherwise(plan: Plan, folder: Path) -> list[Path]:
    """What a folder says of sweeps asked in the same words, whose code, versions or data were others."""
    words, found = json.loads(json.dumps(plan.words)), []
    for path in sorted(folder.glob("*.json")):
        with suppress(ValueError):
            asked = json.loads(path.read_bytes())
            if path.stem != plan.name and isinstance(asked, dict):
                shards = asked.pop("shards", ())
                if asked == words and any((folder / "shards" / str(name)).exists() for name in shards):
                    found.append(path)
    return found


def _contents(plan: Plan, folder: Path) -> dict[str, Any]:
    return {
        shard(folder, unit).name: {
            "run": str(seed),
            "step": step,
            **({} if source is None else {"source_step": source}),
            **({"optimizer": state} if state else {}),
            "examples": [contrast.coords["example"] for contrast in unit.contrasts],
        }
        for (seed, step, source, state), units in plan.cells.items()
        for unit in units
    }
