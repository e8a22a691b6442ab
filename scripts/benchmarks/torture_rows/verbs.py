"""Ctrl-C, errors and a thousand calls of every verb."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import dynamics as dy
from checkpoints import Checkpoint, CheckpointPair, Trajectory, TrajectoryWriter
from dynamics import measures, sites
from scripts.benchmarks.torture_rows.recordings import TINY


@dataclass(frozen=True)
class Asked:
    """What verbs are called with: a recipe, checkpoints of a run, contrasts and a measure."""

    run: Trajectory
    recipe: dy.Recipe
    contrasts: list[dy.Contrast]
    measure: Any = measures.correct_logit

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return self.run.at(12)

    @cached_property
    def pair(self) -> CheckpointPair:
        return CheckpointPair(self.run.at(6), self.run.at(12))

    @cached_property
    def batches(self) -> list[Any]:
        return list(dy.tasks.load(self.run.config).batches(12, 14))

    def call(self, verb: Callable[..., xr.Dataset], places: list[Any], **settings: Any) -> xr.Dataset:
        return verb(self.recipe, self.checkpoint, self.contrasts, places, self.measure, **settings)

    def of_pair(self, verb: Callable[..., xr.Dataset]) -> xr.Dataset:
        return verb(self.recipe, self.pair, self.contrasts, sites.heads(self.recipe.model), self.measure)


def signals(asked: Asked) -> list[Any]:
    return sites.activations(asked.recipe.model, "blocks.*.hook_mlp_out")


def window(asked: Asked) -> xr.Dataset:
    along = [
        replace(each, base=[each.base] * 2, source=[each.source] * 2, probe=each.probe)
        for each in asked.contrasts
    ]
    return replace(asked, contrasts=along).call(dy.patch_window, sites.heads(asked.recipe.model))


STEPS = ("patch_gradients", "patch_updates", "patch_factors", "attribute_step")
OUTPUTS = ("patch_signals", "patch_activations", "attribute_activations")
PATHS = ("patch_paths", "attribute_paths")
PAIRS = ("patch_parameters", "attribute_parameters")

VERBS: Mapping[str, Callable[[Asked], xr.Dataset]] = {
    **{name: lambda a, name=name: a.call(getattr(dy, name), sites.heads(a.recipe.model)) for name in STEPS},
    **{name: lambda a, name=name: a.call(getattr(dy, name), signals(a)) for name in OUTPUTS},
    **{
        name: lambda a, name=name: a.call(getattr(dy, name), sites.paths(a.recipe.model)[:4])
        for name in PATHS
    },
    **{name: lambda a, name=name: a.of_pair(getattr(dy, name)) for name in PAIRS},
    "patch_window": window,
    "interchange": lambda a: dy.interchange(
        a.recipe, a.checkpoint, a.contrasts, signals(a), {"first": 0, "other": 1}
    ),
    "attribute_examples": lambda a: dy.attribute_examples(
        a.recipe, a.checkpoint, a.batches[0], a.contrasts, a.measure
    ),
    "attribute_training": lambda a: dy.attribute_training(
        a.recipe,
        a.checkpoint,
        a.batches,
        sites.heads(a.recipe.model),
        {"probe": a.contrasts[0].probe},
        a.measure,
    ),
}
"""Every verb that runs a model, as it is called here."""


def asked(folder: Path, n_contrasts: int) -> Asked:
    run = dy.training.fit(TINY, folder)
    task = dy.tasks.load(run.config)
    return Asked(run, task.recipe(), list(task.contrasts()[:n_contrasts]))


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
    """Ctrl-C at random moments inside every verb, a measure that raises, a loss of NaN: all is left as it was"""
    given = asked(folder, 2)
    before, handler = around(given.recipe), signal.signal(signal.SIGALRM, stop)
    nan = replace(given.recipe, loss=lambda model, batch: given.recipe.loss(model, batch) * float("nan"))
    failing = {"a measure": replace(given, measure=raises), "a loss": replace(given, recipe=nan)}
    for name, call in VERBS.items():
        began = time.perf_counter()
        alone = call(given)
        seconds = time.perf_counter() - began
        for _ in range(n):
            outcome = stopped(partial(call, given), float(rng.uniform(1e-4, seconds)))
            yield outcome if around(given.recipe) == before else f"BROKEN: {name} left something changed"
        for what, harmful in failing.items():
            if name == "interchange" and what == "a measure":
                continue  # it takes none
            yield failed(name, what, partial(call, harmful), given, before)
        again = call(given).drop_attrs()
        yield (
            "gives what it gave"
            if again.identical(alone.drop_attrs())
            else f"BROKEN: {name} gives other numbers"
        )
    signal.signal(signal.SIGALRM, handler)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def raises(*_: object) -> torch.Tensor:
    raise ZeroDivisionError


def stopped(call: Callable[[], object], after: float) -> str:
    """Whether Ctrl-C ended a call, or came too late."""
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return "stopped and as before"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "was done before and as before"


def failed(name: str, what: str, call: Callable[[], object], given: Asked, before: list[Any]) -> str:
    """Whether a measure that raises, or a loss of NaN, ends a verb with the name of an example or step."""
    try:
        call()
    except (ZeroDivisionError, dy.steps.NonFiniteGradient) as error:
        where = f"{error} {getattr(error, '__notes__', '')}"
        named = any(str(each.coords["example"]) in where for each in given.contrasts) or " step " in where
        well = named and around(given.recipe) == before
        return "raised, place named, as before" if well else f"BROKEN: {name}: {where}"
    return "takes no step" if what == "a loss" else f"BROKEN: {name} raised nothing"


def calls(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """Calls of every verb, opens of a run, one after another: memory and file descriptors do not grow"""
    given = asked(folder, 1)

    def work() -> None:
        fresh = replace(given, run=Trajectory.open(folder))
        for call in VERBS.values():
            call(fresh)

    yield grown(work, n)


def grown(work: Callable[[], object], n: int) -> str:
    """How much memory and how many descriptors a process has more after n times the same, warmed up before."""
    for _ in range(max(3, n // 4)):
        work()
    before = held()
    for _ in range(n):
        work()
    memory, descriptors = (after - then for after, then in zip(held(), before, strict=True))
    well = memory < 30 and descriptors <= 0
    return f"{'' if well else 'BROKEN: '}{memory:.1f} MB and {descriptors} descriptors more"


def held() -> tuple[float, int]:
    """Megabytes of memory and open files of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd"))


def walks(n: int, folder: Path, rng: np.random.Generator) -> Iterator[str]:
    """A walk over so many checkpoints, verified and replayed: memory and file descriptors do not grow"""
    model = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
    recipe = dy.Recipe(model, squared_error, partial(torch.optim.AdamW, lr=1e-3))
    optimizer = recipe.build_optimizer(model.parameters())
    with TrajectoryWriter.create(folder, {}) as writer:
        for step in range(n):
            writer.append(Checkpoint.capture(model, optimizer, step=step))
            optimizer.zero_grad()
            squared_error(model, points(step)).backward()
            optimizer.step()

    def work() -> None:
        run = Trajectory.open(folder)
        if run.verify() or any(verdict.differences for verdict in dy.steps.verify(recipe, run, points)):
            raise AssertionError("a replay differs")

    yield grown(work, 1)


def squared_error(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch.sum(-1, keepdim=True)).square().mean()


def points(step: int) -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
