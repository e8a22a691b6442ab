"""Bits flipped and ends cut off, in every kind of file, by accident or by somebody."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import dynamics as dy
from checkpoints import Trajectory, files, index, shared
from scripts.benchmarks.torture_rows.recordings import a_run
from scripts.benchmarks.torture_rows.trials import LIMIT, flipped, forked, refused


def by_accident(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """One bit flipped, or the end cut off, in every kind of file: 0 silent, 0 crashes, 0 hangs, the file named"""
    run = a_run(folder)
    kinds: dict[str, Callable[[], object]] = {
        "trajectory/step-00000001.h5": lambda: Trajectory.open(run).at(1),
        shared.names(run)[0]: lambda: Trajectory.open(run).at(1),
        "trajectory/index.jsonl": lambda: Trajectory.open(run),
        "manifest.json": lambda: Trajectory.open(run),
        "metrics.csv": lambda: Trajectory.open(run).read_file("metrics.csv"),
        "config.yaml": lambda: Trajectory.open(run).read_file("config.yaml"),
        "results/effects.h5": lambda: dy.results.load(run / "results" / "effects.h5"),
    }

    def tried(path: Path, read: Callable[[], object], whole: bytes) -> str:
        found = [refused(read, path)]
        for _ in range(n):
            path.write_bytes(flipped(whole, rng))
            found.append(refused(read, path))
            length = int(rng.integers(len(whole)))
            path.write_bytes(whole[:length])
            outcome = refused(read, path)
            if outcome == "BROKEN: silent" and path.name == "index.jsonl" and length == len(whole) - 1:
                outcome = "lost its last newline, and nothing with it"
            found.append(outcome)
        return json.dumps(found[1:])

    for name, read in kinds.items():
        path = run / name
        whole = path.read_bytes()
        outcome = forked(partial(tried, path, read, whole), limit=LIMIT + n)
        path.write_bytes(whole)
        yield from (
            [f"BROKEN in {name}{o[6:]}" if o[:6] == "BROKEN" else o for o in json.loads(outcome)]
            if outcome[:1] == "["
            else [outcome]
        )


def sealed_again(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Bits flipped and sealed again, as by somebody who can: 0 crashes, 0 hangs, at most an error in words"""
    run = a_run(folder)
    result, manifest = run / "results" / "effects.h5", run / "manifest.json"
    plain = dy.results.load(result)
    plain.to_netcdf(result.with_name("older.h5"), engine="h5netcdf")
    older, text = result.with_name("older.h5").read_bytes(), manifest.read_text()
    body = text[: text.rindex(', "sha256"')] + "}"
    image = (run / "trajectory/step-00000001.h5").read_bytes()

    def tried(kind: str) -> str:
        path, read = result, partial(dy.results.load, result)
        for _ in range(10):
            if kind == "results":
                path.write_bytes(flipped(older, rng))
            elif kind == "manifest":
                path, read = manifest, partial(Trajectory.open, run)
                path.write_bytes(
                    files.sealed(
                        flipped(body.encode(), rng).decode("latin-1").encode("ascii", "replace").decode()
                    )[0]
                )
            else:
                path, read = run / "trajectory/step-00000001.h5", partial(Trajectory.open(run).at, 1)
                path.write_bytes(flipped(image, rng))
                entries, _ = index.read(run)
                renamed = [
                    replace(e, sha256=files.sha256(path.read_bytes())) if e.step == 1 else e for e in entries
                ]
                index.write(run, renamed)
                read = partial(Trajectory.open(run).at, 1)
            outcome = refused(read, path)
            if outcome.startswith("BROKEN") and outcome != "BROKEN: silent":
                return outcome
        return "ten survived"

    for _ in range(n):
        for kind in ("results", "manifest", "checkpoint"):
            outcome = forked(partial(tried, kind))
            yield f"BROKEN in {kind}{outcome[6:]}" if outcome[:6] == "BROKEN" else outcome
            a_fresh = (manifest, text.encode()), (run / "trajectory/step-00000001.h5", image)
            for path, data in a_fresh:
                path.write_bytes(data)
            index.write(
                run,
                [replace(e, sha256=files.sha256(image)) if e.step == 1 else e for e in index.read(run)[0]],
            )
