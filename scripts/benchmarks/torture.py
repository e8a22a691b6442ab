"""Kills, damage, full disks, hostile files: what is lost, what is let in. A few minutes; with `--long` hours.

Trials run in forked processes with a limit of time, so that a crash or a hang of the interpreter counts as what
it is. Linux alone. Exits with 1 where a promise was broken.

    .venv/bin/python scripts/benchmarks/torture.py --long
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import xarray as xr
import yaml
from tqdm import tqdm

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryError, TrajectoryWriter, files, index
from dynamics import measures, sites
from dynamics.cli import main as cli
from dynamics.config import (
    AliasConfig,
    PatchingConfig,
    PhaseConfig,
    PhasesConfig,
    PrimaryConfig,
    StudyConfig,
    ToyConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import markdown, stamp

LIMIT = 120.0
"""Seconds after which a trial counts as hanging."""

TINY = StudyConfig(
    task=AliasConfig(modulus=8, multipliers=(2, 3, 4), train_multipliers=2),
    model=ToyConfig(n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=8),
    phases=PhasesConfig(pretrain=PhaseConfig(6), x1=PhaseConfig(6), x2=PhaseConfig(6)),
    patching=PatchingConfig(x2_steps=(0,), primary=PrimaryConfig(x2_step=0)),
)


@dataclass
class Row:
    """What a promise came to: how many trials, what was seen, and each trial that broke it."""

    promise: str
    trials: int = 0
    seen: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def note(self, outcome: str) -> None:
        """Count a trial by its outcome; one that begins with "BROKEN" is a broken promise."""
        self.trials += 1
        if outcome.startswith("BROKEN"):
            self.broken.append(outcome)
        else:
            self.seen[outcome] = self.seen.get(outcome, 0) + 1


# --- trials in processes of their own ---------------------------------------------------------------------


def forked(work: Callable[[], str], kill_after: float | None = None, limit: float = LIMIT) -> str:
    """What `work` returns in a forked process; "killed" where it was; a crash or a hang as a broken promise."""
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        try:
            sending.send(work())
        except Exception as error:  # noqa: BLE001  (it is told where trials are counted)
            sending.send(f"BROKEN: {type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    sending.close()
    told = receiving.poll(limit if kill_after is None else kill_after)  # also where it died without a word
    try:
        outcome = str(receiving.recv()) if told else ""
    except EOFError:
        outcome = ""
    if not told:
        process.kill()
    process.join()
    if not told:
        return "killed" if kill_after is not None else f"BROKEN: hung for {limit:.0f} s"
    code = process.exitcode or 0
    silent = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"left with {code}"
    return outcome or f"BROKEN: {silent}"


def refused(work: Callable[[], object], path: Path) -> str:
    """How a read of a damaged or hostile file ends: with the toolkit's own error that names the file, or broken."""
    began = time.perf_counter()
    try:
        work()
    except (TrajectoryError, dy.results.ResultsError) as error:
        if path.name not in str(error):
            return f"BROKEN: {path.name} is not named by {error}"
        return (
            "refused by name"
            if time.perf_counter() - began < 1
            else f"BROKEN: {time.perf_counter() - began:.1f} s"
        )
    except Exception as error:  # noqa: BLE001  (any other error is what is looked for)
        return f"BROKEN: {type(error).__name__} instead of the readable error: {error}"
    return "BROKEN: silent"


# --- what is recorded -------------------------------------------------------------------------------------


def state(step: int) -> Checkpoint:
    """A small checkpoint whose every number is its step."""
    empty = Checkpoint.capture(torch.nn.Module(), step=step)
    return replace(empty, parameters={"w": torch.full((5_000,), float(step))})


def record(folder: Path, n: int = 1_000_000) -> str:
    """Store checkpoints one after another, from where the run stands."""
    with TrajectoryWriter.resume(folder) as writer:
        first = max(writer.steps, default=-1) + 1
        for step in range(first, first + n):
            writer.append(state(step))
            (folder / "finished").write_text(str(step))
    return "done"


def opened(folder: Path, finished: int) -> str:
    """Whether a run opens whole with at least the checkpoints whose append had returned."""
    run = Trajectory.open(folder)
    if problems := run.verify():
        return f"BROKEN: {problems[0]}"
    if run.steps != tuple(range(len(run))) or len(run) < finished + 1:
        return f"BROKEN: {len(run)} checkpoints of {finished + 1} that were finished"
    if any(float(run.at(step).parameters["w"][7]) != step for step in run.steps[-2:]):
        return "BROKEN: other numbers"
    return "opens whole"


def effects() -> xr.Dataset:
    """A result of every type that a file holds."""
    generator = np.random.default_rng(0)
    values = {
        "effect": (("example", "site"), generator.normal(size=(20, 12))),
        "kept": ("site", np.arange(12) > 3),
    }
    return xr.Dataset(values, {"site": [f"L0H{n}" for n in range(12)]}, {"provenance": "{}", "seed": 3})


def a_run(folder: Path) -> Path:
    """A run with each kind of file."""
    with TrajectoryWriter.create(folder, {"lr": 0.01, "steps": 3}, {"commit": "none"}) as writer:
        for step in range(3):
            writer.append(state(step))
        writer.write_file("config.yaml", b"lr: 0.01\nsteps: 3\n")
        writer.write_file("metrics.csv", b"step,loss\n0,1.5\n1,1.25\n")
    dy.results.save(effects(), folder / "results" / "effects.h5")
    return folder


# --- rows -------------------------------------------------------------------------------------------------


def kills(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """SIGKILL at random moments of recording: 0 unreadable, 0 finished checkpoints lost"""
    TrajectoryWriter.create(folder, {}).close()
    for _ in range(n):
        with suppress(FileNotFoundError):
            (folder / "finished").unlink()
        forked(partial(record, folder), kill_after=float(rng.uniform(0.02, 0.2)))
        marked = folder / "finished"
        finished = int(marked.read_text() or -1) if marked.exists() else -1
        yield forked(partial(opened, folder, finished))
        if len(Trajectory.open(folder)) > 100:
            folder = folder.with_name(f"{folder.name}-")
            TrajectoryWriter.create(folder, {}).close()


def killed_imports(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """SIGKILL at random moments of an import: 0 unreadable, the next call finishes it"""
    folder.mkdir()
    for step in range(30):
        torch.save({"w": torch.full((5_000,), float(step))}, folder / f"m_{step}.pt")
    for trial in range(n):
        out = folder / f"run-{trial}"
        work = partial(Trajectory.from_state_dicts, folder, out)
        forked(lambda work=work: work() and "done", kill_after=float(rng.uniform(0.02, 0.4)))  # type: ignore[misc]
        work()
        yield forked(partial(opened, out, 29))


def swept(run: Trajectory, out: Path) -> xr.Dataset:
    """Head by head at every fourth step."""
    contrasts = dy.tasks.load(run.config).contrasts()
    return dy.sweep(
        dy.patch_gradients, run, [12, 14, 16], contrasts, sites.heads, measures.correct_logit, out=out
    )


def killed_sweeps(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """A sweep killed, a shard damaged, then run again: Dataset identical to the undisturbed one"""
    run = dy.training.fit(TINY, folder / "run")
    whole = swept(run, folder / "whole")
    for trial in range(n):
        out = folder / f"out-{trial}"
        forked(lambda out=out: str(swept(run, out)), kill_after=float(rng.uniform(0.05, 1.0)))  # type: ignore[misc]
        for shard in sorted((out / "shards").glob("*.h5"))[:1]:
            shard.write_bytes(flipped(shard.read_bytes(), rng))
        yield "identical" if swept(run, out).identical(whole) else "BROKEN: another Dataset"


def killed_fits(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Training killed at random moments of every phase and called again: equal bit for bit, metrics too"""
    began = time.perf_counter()
    whole = dy.training.fit(TINY, folder / "whole")
    seconds = time.perf_counter() - began
    for trial in range(n):
        out = folder / f"run-{trial}"
        forked(lambda out=out: str(dy.training.fit(TINY, out)), kill_after=float(rng.uniform(0, seconds)))  # type: ignore[misc]
        run = dy.training.fit(TINY, out)
        same = run.steps == whole.steps and all(run.at(s).equals(whole.at(s)) for s in run.steps)
        same &= run.read_file("metrics.csv") == whole.read_file("metrics.csv") and run.verify() == []
        yield "equal" if same else "BROKEN: another run"


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one bit flipped."""
    damaged = bytearray(data)
    damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def damage(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """One bit flipped, or the end cut off, in every kind of file: 0 silent, 0 crashes, 0 hangs, the file named"""
    run = a_run(folder)
    kinds: dict[str, Callable[[], object]] = {
        "trajectory/step-00000001.h5": lambda: Trajectory.open(run).at(1),
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
            path.write_bytes(whole[: rng.integers(len(whole))])
            outcome = refused(read, path)
            if outcome == "BROKEN: silent" and path.name == "index.jsonl":
                outcome = "taken for an append cut short, which leaves every checkpoint before it"
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


def malice(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
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


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def hostile(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Hostile files: 0 executed, 0 read outside, each refused by name in under 1 s and 100 MB"""
    run, canary = a_run(folder / "run"), folder / "executed"
    manifest, lines, step = run / "manifest.json", run / index.INDEX, run / "trajectory/step-00000001.h5"
    result, secret = run / "results" / "effects.h5", folder / "secret.h5"
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
        "checkpoint: /dev/zero": (lambda: (step.unlink(), step.symlink_to("/dev/zero")), read_step, step),
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


def full(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """No room for a file (a quota), a folder that vanishes: the error names the file, what was finished verifies"""
    run = a_run(folder)

    def short_of_room(room: int) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            with TrajectoryWriter.resume(run) as writer:
                writer.append(state(len(writer.steps)))
        except OSError as error:
            return (
                "an error that names file and room"
                if str(run) in str(error) and "bytes are free" in str(error)
                else f"BROKEN: {error}"
            )
        return "BROKEN: no error"

    def vanished() -> str:
        lost = a_run(folder.with_name(f"vanishing-{os.getpid()}"))
        with TrajectoryWriter.resume(lost) as writer:
            (lost / "trajectory").rename(lost / "moved")
            try:
                writer.append(state(9))
            except OSError as error:
                (lost / "moved").rename(lost / "trajectory")
                return opened(lost, 2) if str(lost) in str(error) else f"BROKEN: {error}"
        return "BROKEN: no error"

    for _ in range(n):
        outcome = forked(partial(short_of_room, int(rng.integers(1, 20_000))))
        yield (
            outcome
            if outcome[:6] == "BROKEN"
            else forked(partial(opened, run, 2)).replace("opens whole", outcome)
        )
        yield forked(vanished)


def beside(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """A second writer, and a reader beside a writer: refused in words, no wrong read"""
    TrajectoryWriter.create(folder, {}).close()
    process = multiprocessing.get_context("fork").Process(target=record, args=(folder,))
    process.start()
    try:
        while not (folder / "finished").exists():
            time.sleep(0.01)
        for _ in range(n):
            run = Trajectory.open(folder)
            step = int(rng.choice(run.steps))
            right = float(run.at(step).parameters["w"][3]) == step and run.steps == tuple(range(len(run)))
            yield "read right" if right else "BROKEN: a wrong read"
        try:
            TrajectoryWriter.resume(folder)
            yield "BROKEN: two writers"
        except TrajectoryError as error:
            yield "refused in words" if "is being written by process" in str(error) else f"BROKEN: {error}"
    finally:
        process.kill()
        process.join()


VERBS: dict[str, Callable[..., xr.Dataset]] = {
    "patch_gradients": dy.patch_gradients,
    "patch_updates": dy.patch_updates,
    "attribute_step": dy.attribute_step,
}


def around(recipe: dy.Recipe) -> list[Any]:
    """What a verb must leave as it was: weights, gradients, modes, hooks, random numbers, threads."""
    model = recipe.model
    return [
        [
            (name, p.detach().numpy().tobytes(), p.requires_grad, p.grad is None)
            for name, p in model.named_parameters()
        ],
        [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        torch.get_rng_state().numpy().tobytes(),
        [torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()],
    ]


def interruptions(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Ctrl-C at random moments inside a verb, a measure that raises, a loss of NaN: all is left as it was"""
    run = dy.training.fit(TINY, folder)
    task = dy.tasks.load(run.config)
    recipe, contrasts, checkpoint = task.recipe(), task.contrasts()[:2], run.at(12)
    places, before = sites.heads(recipe.model), around(recipe)

    def raises(*_: object) -> torch.Tensor:
        raise ZeroDivisionError

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def call(verb: str, measure: Any = measures.correct_logit, recipe: dy.Recipe = recipe) -> xr.Dataset:
        return VERBS[verb](recipe, checkpoint, contrasts, places, measure)

    nan = replace(recipe, loss=lambda model, batch: recipe.loss(model, batch) * float("nan"))

    handler = signal.signal(signal.SIGALRM, stop)
    for verb in VERBS:
        began = time.perf_counter()
        alone = call(verb)
        seconds = time.perf_counter() - began
        for _ in range(n):
            outcome = "stopped and as before"
            try:
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-4, seconds)))
                call(verb)
                outcome = "was done before and as before"
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            yield outcome if around(recipe) == before else f"BROKEN: {verb} left something changed"
        for failing in (partial(call, verb, raises), partial(call, verb, recipe=nan)):
            try:
                failing()
                yield f"BROKEN: {verb} raised nothing"
            except (ZeroDivisionError, dy.steps.NonFiniteGradient) as error:
                where = f"{error}{getattr(error, '__notes__', '')}"
                named = str(contrasts[0].coords["example"]) in where and around(recipe) == before
                yield "raised, example named, as before" if named else f"BROKEN: {verb}: {where}"
        yield (
            "gives what it gave"
            if call(verb).drop_attrs().identical(alone.drop_attrs())
            else f"BROKEN: {verb}"
        )
    signal.signal(signal.SIGALRM, handler)


def leaks(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Calls of each verb, opens of a run, one after another: memory and file descriptors do not grow"""
    run = dy.training.fit(TINY, folder)
    task = dy.tasks.load(run.config)
    recipe, contrasts = task.recipe(), task.contrasts()[:1]
    places = sites.heads(recipe.model)[:1]

    def work() -> None:
        checkpoint = Trajectory.open(folder).at(12)
        for verb in VERBS.values():
            verb(recipe, checkpoint, contrasts, places, measures.correct_logit)

    def size() -> tuple[float, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd"))

    for _ in range(max(3, n // 4)):
        work()
    before = size()
    for _ in range(n):
        work()
    grown, opened_files = (after - then for after, then in zip(size(), before, strict=True))
    yield (
        f"{grown:.1f} MB and {opened_files} descriptors more"
        if grown < 30 and not opened_files
        else f"BROKEN: {grown:.0f} MB, {opened_files} descriptors"
    )


ROWS: dict[str, tuple[Callable[[int, Path, np.random.Generator], Iterator[str]], int, int]] = {
    "kills": (kills, 20, 500),
    "imports": (killed_imports, 3, 50),
    "sweeps": (killed_sweeps, 2, 50),
    "fits": (killed_fits, 1, 20),
    "damage": (damage, 20, 1000),
    "malice": (malice, 2, 100),
    "hostile": (hostile, 99, 99),
    "full": (full, 3, 50),
    "beside": (beside, 50, 5000),
    "interruptions": (interruptions, 4, 70),
    "leaks": (leaks, 10, 1000),
}
"""Each row: what is done, how often, and how often with `--long`."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="many more trials of each row")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="some rows alone")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    given = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # before processes are forked
    tqdm.set_lock(threading.RLock())  # one that processes share stays locked where its holder is killed
    rows = []
    for name in tqdm(given.rows, desc="rows"):
        work, short, long = ROWS[name]
        row = Row((work.__doc__ or "").strip())
        with tempfile.TemporaryDirectory() as folder:
            for outcome in work(
                long if given.long else short, Path(folder) / "run", np.random.default_rng(given.seed)
            ):
                row.note(outcome)
        rows.append(row)
    torch.set_num_threads(threads)
    cells = [
        [
            row.promise,
            str(row.trials),
            "; ".join(f"{n} {what}" for what, n in row.seen.items()),
            str(len(row.broken)),
        ]
        for row in rows
    ]
    print("\n".join(markdown(["promise", "trials", "outcomes", "broken"], cells)))
    print(f"\n{'Long counts' if given.long else 'Short counts'}, seed {given.seed}. {stamp(__file__)}")
    broken = [line for row in rows for line in row.broken]
    print("\n".join(dict.fromkeys(broken)), file=sys.stderr)
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
