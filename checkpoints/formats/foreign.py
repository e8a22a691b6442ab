"""Checkpoints that others wrote: torch state dicts, Lightning's .ckpt, safetensors, Hugging Face's folders.

Files are read lazily where their format allows it. Pickles are read with `weights_only=True` and never otherwise.
safetensors and huggingface_hub are imported by the calls that need them; this is the one module of the package
that may. The way back is here too: one checkpoint as a state dict.
"""

import json
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import files
from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import TrajectoryError
from checkpoints.formats.conversion import Contents, Import, Progress, Source, checked
from checkpoints.formats.naming import Naming, some
from checkpoints.rng import RngState, replayed

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
StepOf = Callable[[str], int] | str | None
Load = Callable[[Path], nn.Module]

_reconstruct: Any = np.zeros(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(np.ndarray, np.dtype, type(np.dtype(np.uint32))),
]
"""NumPy's arrays of numbers, of which a Trainer's random numbers are made."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TRAINERS_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


# --- formats ----------------------------------------------------------------------------------------------


def state_dicts(paths: Paths, step: StepOf, key: str | None, names: Naming, progress: Progress) -> Import:
    """Files of `torch.save(state_dict, path)`; see `Trajectory.from_state_dicts`."""
    sources = [
        Source(str(path), (path,), partial(_state_dict, path, key, step_of(str(path), path.stem, step)))
        for path in _files(paths, (".pt", ".pth"))
    ]
    return checked("state_dicts", sources, names, progress)


def lightning(paths: Paths, names: Naming, progress: Progress) -> Import:
    """Files of a Lightning Trainer; see `Trajectory.from_lightning`."""
    sources = [Source(str(path), (path,), partial(_trainers, path)) for path in _files(paths, (".ckpt",))]
    return checked("lightning", sources, names, progress)


def safetensors(paths: Paths, step: StepOf, names: Naming, progress: Progress) -> Import:
    """Files of safetensors; see `Trajectory.from_safetensors`."""
    sources = [
        Source(str(path), (path,), partial(_shards, (path,), step_of(str(path), path.stem, step)))
        for path in _files(paths, (".safetensors",))
    ]
    return checked("safetensors", sources, names, progress)


def huggingface(
    repo: str | os.PathLike[str],
    revisions: Iterable[str],
    step: StepOf,
    names: Naming,
    load: Load | None,
    progress: Progress,
) -> Import:
    """Revisions of a repository, or sub-folders of a folder; see `Trajectory.from_huggingface`."""
    sources = []
    given = [revisions] if isinstance(revisions, str) else revisions
    numbers = {revision: step_of(revision, revision, step) for revision in given}
    for revision, number in numbers.items():
        folder = _folder(repo, revision)
        files = _weights(folder)
        read = partial(_shards, files, number) if load is None else partial(_loaded, load, folder, number)
        sources.append(Source(f"{repo}@{revision}", files, read))
    return checked("huggingface", sources, names, progress)


def trainer_folders(
    folder: str | os.PathLike[str], names: Naming, load: Load | None, progress: Progress
) -> Import:
    """The `checkpoint-500` folders of a Hugging Face Trainer; see `Trajectory.from_trainer`."""
    inside = [each for each in Path(folder).glob("checkpoint-*") if each.name.rpartition("-")[2].isdigit()]
    if not inside:
        raise TrajectoryError(f"{str(folder)!r} has no folders like checkpoint-500, which a Trainer writes.")
    sources = []
    for each in sorted(inside):
        beside = tuple(each / name for name in _TRAINERS_FILES if (each / name).is_file())
        step, weights = int(each.name.rpartition("-")[2]), _weights(each)
        read = partial(_trainer_folder, each, weights, step, load)
        sources.append(Source(str(each), (*weights, *beside), read))
    return checked("trainer", sources, names, progress)


# --- where sources are, and of which step -----------------------------------------------------------------


def step_of(text: str, end: str, step: StepOf) -> int:
    """The step in a path or revision: by a function, by a pattern, or the last integer in `end`.

    Raises:
        TrajectoryError: it cannot be told.
    """
    if callable(step):
        return step(text)
    try:
        *_, match = re.finditer(r"\d+" if step is None else step, end if step is None else text)
        return int(match[min(1, match.re.groups)])
    except (ValueError, TypeError, re.error) as error:
        sought = "the last integer before the extension" if step is None else f"the pattern {step!r}"
        raise TrajectoryError(
            f"{text!r} does not say its step: {sought} was looked for. Give step=, a pattern whose first group "
            "is the step, such as 'step_([0-9]+)', or a function of the path."
        ) from error


def _files(paths: Paths, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that paths, folders and globs stand for; folders for those with a suffix."""
    found: dict[Path, None] = {}
    for given in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = Path(given)
        if path.is_dir():
            inside = sorted(each for each in path.iterdir() if each.suffix in suffixes)
        else:
            inside = [path] if path.exists() else sorted(map(Path, glob(str(given), recursive=True)))
        if not inside:
            there = f"holds no {' or '.join(suffixes)} files" if path.is_dir() else "leads to no file"
            raise TrajectoryError(
                f"{str(given)!r} {there}. Give files, a folder or a glob such as 'runs/*.pt'."
            )
        found |= dict.fromkeys(inside)
    return list(found)


def _folder(repo: str | os.PathLike[str], revision: str) -> Path:
    """Where one revision's files are; those of a repository are fetched, unless they were before."""
    local = Path(repo)
    if local.is_dir():
        if not (local / revision).is_dir():
            there = sorted(each.name for each in local.iterdir() if each.is_dir())
            raise TrajectoryError(
                f"{str(repo)!r} has no folder {revision!r}; it has {some(there) or 'none'}."
            )
        return local / revision
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise TrajectoryError(
            f"{str(repo)!r} is no folder here, and to fetch it from Hugging Face huggingface_hub is needed: "
            "pip install huggingface_hub"
        ) from error
    try:
        for name in _WEIGHTS:
            stem, _, suffix = name.partition(".")
            wanted = [name, f"{name}.index.json", f"{stem}-*-of-*.{suffix}", "config.json"]
            folder = Path(snapshot_download(str(repo), revision=revision, allow_patterns=wanted))
            if any((folder / file).exists() for file in wanted[:2]):
                break
    except (OSError, ValueError) as error:
        raise TrajectoryError(
            f"{str(repo)!r} is no folder here, and its revision {revision!r} could not be fetched from Hugging "
            f"Face: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    return folder


def _weights(folder: Path) -> tuple[Path, ...]:
    """The files of weights in a folder as `save_pretrained` writes it: one, or the shards of an index."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return (folder / name,)
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise TrajectoryError(f"{index} is not a readable index of shards: {error}") from error
            if outside := [shard for shard in shards if Path(shard).name != shard]:
                raise TrajectoryError(f"{index} names {some(outside)}, which are not files beside it")
            return tuple(folder / shard for shard in shards)
    raise TrajectoryError(
        f"{folder} holds no weights: expected {' or '.join(_WEIGHTS)}, or an index of shards."
    )


# --- what is in a file ------------------------------------------------------------------------------------


def _unpickled(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors and plain values; of a zip file only what is used is read."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        needed = re.findall(r"GLOBAL (\S+)", str(error))
        if not needed:
            raise TrajectoryError(f"{path} is no file of torch.save: {error}".partition("\n")[0]) from error
        if zipfile.is_zipfile(path):  # of others, torch names the first alone
            needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        raise TrajectoryError(
            f"{path} holds more than tensors and plain values: {', '.join(needed)}, which could run code. Nothing "
            "of it was loaded. If you trust who wrote it, call this `with torch.serialization.safe_globals("
            f"[{needed[0].rpartition('.')[2]}, ...])`; or save the state dict alone."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise TrajectoryError(f"{path} is not readable as a file of torch.save: {reason}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise TrajectoryError(f"to read {path} safetensors is needed: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise TrajectoryError(f"{path} is not readable as safetensors: {error}") from error


def _named(path: Path, contents: Any) -> Mapping[str, Any]:
    if not isinstance(contents, Mapping) or not all(isinstance(name, str) for name in contents):
        raise TrajectoryError(
            f"{path} holds a {type(contents).__name__}, expected a dict of names -> tensors."
        )
    return contents


def _state_dict(path: Path, key: str | None, step: int) -> Contents:
    contents = _named(path, _unpickled(path))
    if key is not None and key not in contents:
        raise TrajectoryError(f"{path} has no entry {key!r}; it has {some(list(contents))}.")
    return Contents(step, contents if key is None else _named(path, contents[key]))


def _shards(files: Sequence[Path], step: int) -> Contents:
    tensors: dict[str, Any] = {}
    for path in files:
        tensors |= _safetensors(path) if path.suffix == ".safetensors" else _named(path, _unpickled(path))
    return Contents(step, tensors)


def _loaded(load: Load, folder: Path, step: int) -> Contents:
    model = load(folder)
    return Contents(step, model.state_dict(), model=model)


def _trainers(path: Path) -> Contents:
    saved = _named(path, _unpickled(path))
    if missing := [key for key in ("state_dict", "global_step") if key not in saved]:
        raise TrajectoryError(
            f"{path} is no checkpoint of a Lightning Trainer: it has no {some(missing)}, but {some(list(saved))}. "
            "Trajectory.from_state_dicts reads state dicts."
        )
    state = _named(path, saved["state_dict"])
    return Contents(
        saved["global_step"], state, saved.get("optimizer_states", ()), saved.get("lr_schedulers", ())
    )


def _trainer_folder(folder: Path, weights: Sequence[Path], step: int, load: Load | None) -> Contents:
    contents = _shards(weights, step) if load is None else _loaded(load, folder, step)
    optimizers, schedulers, generators = (
        [_unpickled(folder / name)] if (folder / name).is_file() else [] for name in _TRAINERS_FILES
    )
    rng = [_rng(saved) for saved in generators]
    return replace(contents, optimizers=optimizers, schedulers=schedulers, rng=rng[0] if rng else None)


def _rng(saved: Mapping[str, Any]) -> RngState:
    """The generators as a Trainer saves them."""
    with replayed(None):
        random.setstate(saved["python"])
        np.random.set_state(saved["numpy"])  # noqa: NPY002  (the global generator is what is kept)
        torch.set_rng_state(saved["cpu"])
        state = RngState.capture()
    cuda = saved.get("cuda", ())
    return replace(state, cuda=(cuda,) if isinstance(cuda, Tensor) else tuple(cuda))


# --- the way back -----------------------------------------------------------------------------------------


def write_state_dict(checkpoint: Checkpoint, path: Path, imported: Mapping[str, Any]) -> None:
    """One checkpoint as a state dict; see `Trajectory.export`.

    Args:
        checkpoint: what is written.
        path: a new file, `.pt`, `.pth` or `.safetensors`.
        imported: the provenance of an import, which knows other names and lent buffers; empty for any other.
    """
    if path.exists():
        raise TrajectoryError(
            f"{str(path)!r} is there already, and nothing is overwritten: choose another name."
        )
    lent = imported.get("lent", [])
    tensors = {**checkpoint.parameters, **{n: t for n, t in checkpoint.buffers.items() if n not in lent}}
    if path.suffix in (".pt", ".pth"):
        buffer = BytesIO()
        tied = {name: own for name, own in imported.get("tied", {}).items() if own in tensors}
        torch.save({**tensors, **{name: tensors[own] for name, own in tied.items()}}, buffer)
        data = buffer.getvalue()
    elif path.suffix == ".safetensors":
        data = _as_safetensors(tensors)
    else:
        raise TrajectoryError(
            f"{str(path)!r} ends in neither .pt nor .safetensors, which say how it is written."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, data)


def _as_safetensors(tensors: dict[str, Tensor]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise TrajectoryError("to write safetensors is needed: pip install safetensors") from error
    try:
        return save(tensors, {"format": "pt"})
    except (LookupError, ValueError, RuntimeError) as error:
        raise TrajectoryError(f"safetensors cannot hold it: {error}; a .pt file can.") from error
