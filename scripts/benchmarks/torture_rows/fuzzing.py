"""Readers given bytes of all kinds: whole files, parts of them put together anew, numbers and texts exchanged."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dynamics as dy
from checkpoints import Trajectory, TrajectoryError, encoding, files, index, store, values
from scripts.benchmarks.torture_rows.recordings import a_run
from scripts.benchmarks.torture_rows.trials import LIMIT, forked

EXAMPLES = 25
"""So many files are made on end in one process."""


def readers(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Readers given files edited at random (by hypothesis, and atheris if installed): no crash, at most words"""
    run = a_run(folder)
    torch.save({"w": torch.arange(20.0)}, folder / "m_1.pt")
    save_file({"w": torch.arange(20.0)}, folder / "m_1.safetensors")
    began = time.process_time() + children()
    while time.process_time() + children() - began < n:
        for name, read in readings(run).items():
            whole = (run / name).read_bytes()
            yield forked(partial(fuzzed, run / name, whole, read, int(rng.integers(1 << 30))), limit=LIMIT)
            if importlib.util.find_spec("atheris") is not None:
                yield guided(run / name, whole, read, max(1, n // 12), int(rng.integers(1 << 30)))
            (run / name).write_bytes(whole)


def children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def readings(run: Path) -> dict[str, Callable[[Path], object]]:
    """Each kind of file, and what reads it."""
    out = run.with_name("imported")
    return {
        "trajectory/step-00000001.h5": lambda path: encoding.decode(path.read_bytes()),
        "trajectory/index.jsonl": lambda path: Trajectory.open(run),
        "manifest.json": lambda path: Trajectory.open(run),
        "results/effects.h5": dy.results.load,
        "m_1.pt": lambda path: Trajectory.from_state_dicts(path, out / str(time.monotonic_ns())),
        "m_1.safetensors": lambda path: Trajectory.from_safetensors(path, out / str(time.monotonic_ns())),
    }


def edited(whole: bytes) -> st.SearchStrategy[bytes]:
    """Files made of a whole one: parts left out, doubled, exchanged or overwritten, numbers and words changed."""
    place = st.integers(0, len(whole))
    pieces = st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"-1", b"1e999", b"9" * 40, b"null", b"[" * 99, b'{"', b"\0" * 8, b"\xff" * 8]),
        st.tuples(place, place).map(lambda ends: whole[min(ends) : max(ends)][:4096]),
    )
    edit = st.tuples(place, st.integers(0, 64), pieces)

    def made(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = whole
        for at, length, piece in edits:
            data = data[:at] + piece + data[at + length :]
        return data

    return st.lists(edit, min_size=1, max_size=4).map(made)


def fuzzed(path: Path, whole: bytes, read: Callable[[Path], object], number: int) -> str:
    """Read many edited files; sealed ones are sealed again every other time, so that what is inside is read."""

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(edited(whole), st.booleans())
    def tried(data: bytes, seal_again: bool) -> None:
        if seal_again and path.name == "manifest.json":
            with suppress(ValueError):
                body = data[: data.rindex(b', "sha256"')].decode("ascii") + "}"
                data, _ = files.sealed(body)
        path.write_bytes(data)
        with suppress(TrajectoryError, dy.results.ResultsError):
            read(path)

    tried()
    return f"{EXAMPLES} files read or refused in words"


def guided(path: Path, whole: bytes, read: Callable[[Path], object], seconds: int, number: int) -> str:
    """Read edited files for so long, led by which lines of the readers they reach (libFuzzer)."""
    import atheris

    def one(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(TrajectoryError, dy.results.ResultsError):
            read(path)

    def work() -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        for module, name in (
            (index, "read"),
            (store, "read_manifest"),
            (values, "from_json"),
            (encoding, "decode"),
        ):
            setattr(module, name, atheris.instrument_func(getattr(module, name)))
        corpus = path.with_name(f"{path.name}.corpus")
        corpus.mkdir(exist_ok=True)
        (corpus / "whole").write_bytes(whole)
        flags = [f"-max_total_time={seconds}", f"-seed={number % (1 << 31)}", f"-artifact_prefix={corpus}/"]
        atheris.Setup(["fuzz", *flags, f"-max_len={2 * len(whole)}", str(corpus)], one)
        atheris.Fuzz()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(seconds + LIMIT)
    if process.exitcode is None:
        process.kill()
        return f"BROKEN: {path.name} hung"
    crashes = list(path.with_name(f"{path.name}.corpus").glob("crash-*"))
    if process.exitcode or crashes:
        return f"BROKEN: {path.name} left with {process.exitcode}, {len(crashes)} crashes"
    return "led by coverage, read or refused in words"
