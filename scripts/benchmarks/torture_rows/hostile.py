"""Files made to harm: none is executed, none leads outside."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml

import dynamics as dy
from checkpoints import Trajectory, files, index
from dynamics.cli import main as cli
from scripts.benchmarks.torture_rows.recordings import a_run
from scripts.benchmarks.torture_rows.trials import forked, refused


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def made_to_harm(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Hostile files: 0 executed, 0 read outside, each refused by name in under 1 s and 100 MB"""
    run, canary = a_run(folder / "run"), folder / "executed"
    manifest, lines, step = run / "manifest.json", run / index.INDEX, run / "trajectory/step-00000001.h5"
    result, metrics, secret = run / "results" / "effects.h5", run / "metrics.csv", folder / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["w"] = np.arange(3.0)
    read_result, read_step = partial(dy.results.load, result), lambda: Trajectory.open(run).at(1)

    def dataset(edit: Callable[[h5py.File], object]) -> Callable[[], object]:
        def make() -> None:
            plain = dy.results.load(result)
            result.unlink()
            plain.to_netcdf(result, engine="h5netcdf")
            with h5py.File(result, "r+") as file:
                edit(file)

        return make

    def checkpoint(edit: Callable[[h5py.File], object]) -> Callable[[], object]:
        def make() -> None:
            with h5py.File(step, "r+") as file:
                del file["parameters/w"]
                edit(file)
            data = step.read_bytes()
            entries = [
                replace(e, sha256=files.sha256(data), bytes=len(data)) if e.step == 1 else e
                for e in index.read(run)[0]
            ]
            index.write(run, entries)

        return make

    def virtual(file: h5py.File, name: str = "parameters/w") -> None:
        layout = h5py.VirtualLayout((3,), "f8")
        layout[...] = h5py.VirtualSource(secret, "w", (3,), dtype="f8")
        file.create_virtual_dataset(name, layout)

    def resealed(**changes: Any) -> Callable[[], object]:
        document, _ = files.unsealed(manifest.read_bytes())
        return partial(manifest.write_bytes, files.sealed(json.dumps({**document, **changes}))[0])

    def entry(**changes: Any) -> Callable[[], object]:
        return lambda: index.write(
            run, [replace(e, **changes) if e.step == 1 else e for e in index.read(run)[0]]
        )

    def hdf5(name: str) -> dict[str, Callable[[h5py.File], object]]:
        return {
            "external link": lambda f: f.update({name: h5py.ExternalLink(str(secret), "/w")}),
            "soft link": lambda f: f.update({name: h5py.SoftLink("/index")}),
            "external storage": lambda f: f.create_dataset(name, (3,), "f8", external=str(secret)),
            "virtual": partial(virtual, name=name),
            "4 TB": lambda f: f.create_dataset(name, (1 << 40,), "f4", chunks=(1 << 20,)),
            "4 TB, plainly": lambda f: f.create_dataset(name, (1 << 40,), "f4"),
            "bomb": lambda f: f.create_dataset(name, data=np.zeros(1 << 24), compression="gzip"),
            "references": lambda f: f.create_dataset(name, (3,), h5py.ref_dtype),
            "lists": lambda f: f.create_dataset(name, (3,), h5py.vlen_dtype("f8")),
            "records": lambda f: f.create_dataset(name, data=np.zeros(3, [("a", "f8")])),
            "group": lambda f: f.create_group(name),
        }

    pickled, safe = folder / "model_1.pt", folder / "model_1.safetensors"
    ckpt = folder / "model_1.ckpt"
    cases: dict[str, tuple[Callable[[], object], Callable[[], object], Path]] = {
        **{f"results: {k}": (dataset(e), read_result, result) for k, e in hdf5("odd").items()},
        **{f"checkpoint: {k}": (checkpoint(e), read_step, step) for k, e in hdf5("parameters/w").items()},
        **{
            f"index: {file}": (entry(file=file), partial(Trajectory.open, run), lines)
            for file in ("../secret.h5", str(secret), "trajectory/../../secret.h5", "trajectory/..h5", "")
        },
        **{
            f"manifest: {text[:12]}": (
                partial(manifest.write_text, text),
                partial(Trajectory.open, run),
                manifest,
            )
            for text in (
                "[" * 100_000,
                '{"a":' * 100_000,
                '{"schema_version": 1e999}',
                "9" * 100_000,
                "",
                "[]",
                "\0" * 9,
            )
        },
        "manifest: files": (resealed(files={"../x": ["0"]}), partial(Trajectory.open, run), manifest),
        "manifest: version 9": (resealed(schema_version=9), partial(Trajectory.open, run), manifest),
        "manifest: $pickle": (resealed(config={"$pickle": "x"}), partial(Trajectory.open, run), manifest),
        "manifest: a pipe": (
            lambda: (manifest.unlink(), os.mkfifo(manifest)),
            partial(Trajectory.open, run),
            manifest,
        ),
        **{
            f"{name}: {kind}": (
                lambda path=path, put=put: (path.unlink(missing_ok=True), put(path)),
                read,
                path,
            )
            for name, path, read in (
                ("checkpoint", step, read_step),
                ("results", result, lambda: [dy.results.load(path) for path in dy.results.files_of(run)]),
                ("index", lines, partial(Trajectory.open, run)),
                ("metrics", metrics, lambda: Trajectory.open(run).read_file("metrics.csv")),
            )
            for kind, put in (
                ("/dev/zero", lambda path: path.symlink_to("/dev/zero")),
                ("a link", lambda path: path.symlink_to(secret)),
                ("a pipe", os.mkfifo),
            )
        },
        **{
            f"index: {values}": (entry(**values), read_step, named)
            for values, named in (
                *(({"step": 0}, lines), ({"step": -1}, lines), ({"bytes": -1}, lines)),
                *(({"bytes": 1 << 62}, step), ({"sha256": ""}, step)),
            )
        },
        "pickle": (
            lambda: pickled.write_bytes(pickle.dumps({"w": Canary(canary)}, protocol=2)),
            lambda: Trajectory.from_state_dicts(pickled, folder / "imported"),
            pickled,
        ),
        "pickle by torch": (
            lambda: torch.save({"w": Canary(canary)}, pickled),
            lambda: Trajectory.from_state_dicts(pickled, folder / "imported"),
            pickled,
        ),
        "pickle in a .ckpt": (
            lambda: torch.save({"state_dict": {}, "global_step": 1, "hook": Canary(canary)}, ckpt),
            lambda: Trajectory.from_lightning(ckpt, folder / "imported"),
            ckpt,
        ),
        **{
            f"safetensors: header of {size}": (
                partial(safe.write_bytes, size.to_bytes(8, "little") + b'{"w":{"dtype":"F32"'),
                lambda: Trajectory.from_safetensors(safe, folder / "imported"),
                safe,
            )
            for size in (0, 10, 1 << 20, 1 << 62)
        },
        **{
            f"safetensors: {words}": (
                partial(safe.write_bytes, len(text).to_bytes(8, "little") + text + bytes(8)),
                lambda: Trajectory.from_safetensors(safe, folder / "imported"),
                safe,
            )
            for words, text in {
                "data beyond its end": b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
                "a shape beyond its data": b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}',
                "negative": b'{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
                "brackets": b"[" * 100_000,
            }.items()
        },
    }

    def tried(make: Callable[[], object], read: Callable[[], object], path: Path) -> str:
        make()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = refused(read, path)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
        return outcome if grown < 100 else f"BROKEN: took {grown:.0f} MB"

    whole = {path: path.read_bytes() for path in (manifest, lines, step, result)}
    for name, case in list(cases.items())[: max(n, 0)]:
        outcome = forked(partial(tried, *case))
        yield f"BROKEN: {name}{outcome[6:]}" if outcome[:6] == "BROKEN" else outcome
        for path, data in whole.items():
            path.unlink(missing_ok=True)
            path.write_bytes(data)
        if canary.exists():
            yield f"BROKEN: {name} was executed"
            canary.unlink()
    document = folder / "config.yaml"
    document.write_text(f"seed: !!python/object/apply:os.system ['touch {canary}']\n")
    forked(lambda: str(cli(["fit", "--config", str(document), "--out", str(folder / "fitted")])))
    with suppress(yaml.YAMLError):
        yaml.safe_load(document.read_text())
    yield "BROKEN: YAML was executed" if canary.exists() else "refused by name"
