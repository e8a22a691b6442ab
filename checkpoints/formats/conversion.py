"""Sources of another format as checkpoints: looked at together first, then converted one at a time.

What does not fit is known before anything is stored. A source is known again by the sha256 of its files, so an
import that was interrupted goes on with the same bytes wherever they lie, and with no others.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from checkpoints import encoding
from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import TrajectoryError
from checkpoints.formats.naming import Naming, Split, optimizer_state, split
from checkpoints.rng import RngState
from checkpoints.wrappers import own_parameters

Progress = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Contents:
    """What one source holds, under its own names; `model` is what it was loaded into, if it was."""

    step: int
    tensors: Mapping[str, Any]
    optimizers: Sequence[Mapping[str, Any]] = ()
    schedulers: Sequence[dict[str, Any]] = ()
    model: nn.Module | None = None
    rng: RngState | None = None


@dataclass(frozen=True)
class Source:
    """One checkpoint of another format: what to call it, its files, and how they are read."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[], Contents]


@dataclass(frozen=True)
class Import:
    """Sources that fit together: where they are from, and by rising step the checkpoint of each when asked for."""

    provenance: dict[str, Any]
    checkpoints: Mapping[int, Callable[[], Checkpoint]]

    def continues(self, stored: Mapping[str, Any] | None) -> bool:
        """Whether a run with this provenance was begun with the same bytes, wherever they lie, read alike."""
        return stored is not None and _placeless(stored) == _placeless(self.provenance)


def checked(kind: str, sources: Sequence[Source], names: Naming, progress: Progress) -> Import:
    """The import of sources of different steps and the same tensors; each is read once for it.

    Raises:
        TrajectoryError: there are none, or they are not that; the message names the source.
    """
    records: dict[int, dict[str, Any]] = {}
    checkpoints: dict[int, Callable[[], Checkpoint]] = {}
    first: dict[str, Any] = {}
    for source in progress(sources):
        step, found = _looked_at(source, names)
        if step in records:
            raise TrajectoryError(
                f"{records[step]['name']} and {source.name} are both of step {step}; leave one of them out."
            )
        if first:
            _check_alike(source.name, found["tensors"], sources[0].name, first["tensors"])
        else:
            encoding.encode(_converted(source, names)[0])  # what cannot be stored is said now
            first = found
        files = [_record(path) for path in source.files]
        records[step] = {"step": step, "name": source.name, "files": files}
        checkpoints[step] = partial(_checkpoint, source, names)
    if not records:
        raise TrajectoryError("There is nothing to import: not one file or revision was given.")
    provenance = {
        "kind": kind,
        "prefix": names.prefix,
        "ignore": list(names.ignore),
        **first,
        "sources": [records[step] for step in sorted(records)],
    }
    return Import(provenance, {step: checkpoints[step] for step in sorted(checkpoints)})


def _placeless(provenance: Mapping[str, Any]) -> dict[str, Any]:
    sources = [(each["step"], [file["sha256"] for file in each["files"]]) for each in provenance["sources"]]
    return {**provenance, "sources": sources}


def _record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path.absolute()), "bytes": path.stat().st_size, "sha256": sha256}


def _converted(source: Source, names: Naming) -> tuple[Checkpoint, Split]:
    """A source as a checkpoint; its numeric environment is not known."""
    contents = source.read()
    model = names.model or contents.model
    try:
        found = split(contents.tensors, replace(names, model=contents.model or names.model))
        if len(contents.optimizers) > 1 or len(contents.schedulers) > 1:
            raise TrajectoryError(
                f"it has {len(contents.optimizers)} optimizers and {len(contents.schedulers)} schedulers, a "
                "checkpoint at most one of each. Import the weights alone: from_state_dicts(paths, out, "
                "key='state_dict')."
            )
        optimizers = [optimizer_state(saved, found, names) for saved in contents.optimizers]
    except TrajectoryError as error:
        raise TrajectoryError(f"{source.name}: {error}") from error
    checkpoint = Checkpoint(
        step=contents.step,
        parameters=found.parameters,
        buffers=found.buffers,
        optimizer=optimizers[0] if optimizers else None,
        scheduler=contents.schedulers[0] if contents.schedulers else None,
        rng=contents.rng,
        fingerprint={},
        begins_optimizer=bool(optimizers) and contents.step == 0,
        frozen=()
        if model is None
        else tuple(n for n, p in own_parameters(model).items() if not p.requires_grad),
    )
    return checkpoint, found


def _checkpoint(source: Source, names: Naming) -> Checkpoint:
    return _converted(source, names)[0]


def _looked_at(source: Source, names: Naming) -> tuple[int, dict[str, Any]]:
    """A source's step, and what it holds in words: nothing of it stays in memory."""
    checkpoint, found = _converted(source, names)
    kinds = {"parameters": checkpoint.parameters, "buffers": checkpoint.buffers}
    tensors = {
        f"{kind}/{name}": f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for kind, named in kinds.items()
        for name, tensor in named.items()
    }
    if not tensors:
        raise TrajectoryError(f"{source.name} holds no tensors.")
    return checkpoint.step, {
        "tensors": tensors,
        "tied": found.tied,
        "lent": found.lent,
        "left_out": found.left_out,
    }


def _check_alike(name: str, tensors: Mapping[str, str], first: str, expected: Mapping[str, str]) -> None:
    different = [
        f"{each} is {tensors.get(each, 'missing')}, there {expected.get(each, 'missing')}"
        for each in {**expected, **tensors}
        if tensors.get(each) != expected.get(each)
    ]
    if different:
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        raise TrajectoryError(
            f"{name} is not of the same model as {first}: {'; '.join(different[:3])}{more}. "
            "A trajectory is of one model."
        )
