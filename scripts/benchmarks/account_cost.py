"""What an account of training costs beside a bare loop, and whether it adds up. About ten minutes on one core.

On the default alias run (trained first if --run has none): CPU time a step, medians of interleaved repeats, of a
bare loop of the same steps and of `attribute_training` over all 46 matrices, with and without sources, with one
question of each held-out alias as the probe and with all of them; peak memory in models, in a process of its own;
and the account of all of X2 in correct logit and log-probability, sum beside change.

    .venv/bin/python scripts/benchmarks/account_cost.py --run runs/aliases --readme
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics import results, sites
from dynamics.batch import Batch, concatenate
from dynamics.config import StudyConfig
from dynamics.steps.replaying import resumed
from dynamics.tasks import AliasTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.into_readme import conclude, markdown, stamp

STEPS, REPEATS = 20, 5
LENGTHS = {500: 0.003, 2000: 0.01}
"""Steps of X2 that are added up, and the tolerance of each step."""
MEMORY_STEPS = 3

Ways = dict[str, Callable[[], Any]]


def questions(task: AliasTask, each: int | None = None) -> Batch:
    """The untrained questions of Dt3 and Df4, all or the first few of each alias, up to the scored position."""
    probes = [contrast.probe for contrast in task.contrasts()]
    return replace(concatenate([probe[:each] for probe in probes]), example_ids=None)


def ways(task: AliasTask, start: Checkpoint) -> Ways:
    """What is timed, by name."""
    recipe = task.recipe()
    batches = [task.batch(start.step + i) for i in range(STEPS)]
    parts = sites.matrices(recipe.model)

    def loop() -> None:
        with resumed(recipe, start) as training:
            for batch in batches:
                training.take(batch)

    def account(probes: Mapping[str, Batch], **settings: Any) -> Callable[[], Any]:
        return partial(
            dy.attribute_training,
            recipe,
            start,
            batches,
            parts,
            probes,
            dy.measures.correct_logit,
            **settings,
        )

    one, every = {"30 aliases": questions(task, 1)}, {"30 aliases": questions(task)}
    by_alias = {str(c.coords["example"]): c.probe for c in task.contrasts()}
    sets, integers = task.sources, partial(task.sources, by="integer")
    return {
        "bare loop": loop,
        "one question of each of 30 aliases": account(one),
        "the same, trapezoid alone": account(one, max_nodes=2),
        "the same, by set (8 sources)": account(one, sources=sets),
        "the same, by definition (62 sources)": account(one, sources=integers),
        "all 360 questions": account(every),
        "all 360 questions, by set": account(every, sources=sets),
        "30 probes, each alias's questions": account(by_alias),
    }


def timed(of: Ways) -> dict[str, float]:
    """Milliseconds of CPU a step: medians of interleaved repeats, the first of each not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in of}
    for _ in range(REPEATS + 1):
        for name, call in of.items():
            begin = time.process_time()
            call()
            seconds[name].append(time.process_time() - begin)
    return {name: 1000 * statistics.median(found[1:]) / STEPS for name, found in seconds.items()}


# --- memory -----------------------------------------------------------------------------------------------


def peaks() -> dict[str, float]:
    """Models of memory at the peak of an account beyond the user's own model, by number of sources."""
    found = {}
    for sources in (0, 2, 8):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found[f"{sources} sources"] = pool.submit(_peak, sources).result()
    return found


def _peak(n_sources: int) -> float:
    """In models, of a net of 25 million parameters."""
    torch.set_num_threads(1)
    _account_of(8, n_sources)  # the code itself is loaded
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    size = _account_of(2048, n_sources)
    return (_resident("VmHWM") - before) * 1024 / size - 1


def _account_of(width: int, n_sources: int, depth: int = 6) -> int:
    """Take one of a few steps of a net, and return the net's size in bytes."""
    net = torch.nn.Sequential(
        *(m for _ in range(depth) for m in (torch.nn.Linear(width, width), torch.nn.Tanh())),
        torch.nn.Linear(width, 4),
    )
    size = sum(p.nbytes for p in net.parameters())

    def loss(model: Any, batch: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    recipe = dy.Recipe(net, loss, partial(torch.optim.AdamW, lr=1e-3))
    batch = (torch.randn(16, width), torch.arange(16) % 4)
    parts = [sites.Site(name, {name: ...}) for name, _ in net.named_parameters()]
    sources = None if not n_sources else (lambda b: [i % n_sources for i in range(len(b[1]))])
    given = (recipe, None, [batch] * MEMORY_STEPS, parts, {"p": batch}, loss)
    dy.attribute_training(*given, sources=sources, max_nodes=2)
    return size


def _resident(which: str) -> float:
    """A line of the process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(which))


# --- does it add up ---------------------------------------------------------------------------------------


def sums(task: AliasTask, start: Checkpoint, out: Path) -> list[list[str]]:
    """Rows of a table: for each measure and length, the change of Dt3 − Df4, the account's sum, the residuals."""
    recipe = task.recipe()
    asked = {name: task.evaluation[name] for name in ("Dt3", "Df4")}
    asked = {n: replace(b, tokens=b.tokens[:, : int(b.target_pos.max()) + 1]) for n, b in asked.items()}
    rows = []
    for measure in (dy.measures.correct_logit, dy.measures.correct_log_prob):
        for n, tolerance in LENGTHS.items():
            whole = partial(
                dy.attribute_training,
                recipe,
                start,
                task.batches(start.step, start.step + n),
                sites.components(recipe.model),
                asked,
                measure,
                sources=task.sources,
                tolerance=tolerance,
            )
            found = results.difference(runs.stored(out / f"{measure.name}-{n}.h5", whole), "Dt3", "Df4")
            change = float(found["value"][-1] - found["value"][0])
            written = float(found["attribution"].sum())
            sizes = float(abs(found["residual"]).sum())
            rows.append(
                [
                    measure.name,
                    f"{n:,}",
                    f"{tolerance}",
                    f"{change:.4f}",
                    f"{written:.4f}",
                    f"{100 * abs(written - change) / abs(change):.2f} %",
                    f"{100 * sizes / abs(change):.1f} %",
                ]
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Time, weigh and add up, and say it."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    parser = runs.parser(__doc__)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/aliases"), help="a run of the default alias study"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/account-cost"), help="where results are kept")
    given = parser.parse_args(arguments)
    run = dy.training.fit(StudyConfig(), given.run) if not given.run.exists() else Trajectory.open(given.run)
    task = dy.tasks.aliases.load(run.config)
    start = run.at(task.config.phases.starts["x2"])
    cost, memory, added = timed(ways(task, start)), peaks(), sums(task, start, given.out)
    loop = cost["bare loop"]
    lines = [
        *markdown(
            ["all 46 matrices, correct logit", "ms a step", "bare loops"],
            [[name, f"{ms:.1f}", f"{ms / loop:.1f}"] for name, ms in cost.items()],
        ),
        "",
        *markdown(
            ["measure of Dt3 − Df4", "steps of X2", "tolerance", "change", "sum", "apart", "Σ abs(residual)"],
            added,
        ),
        "",
        "Peak memory beyond the user's model, of a net of 25 million parameters, in models: "
        + ", ".join(f"{name} {models:.1f}" for name, models in memory.items())
        + f". Milliseconds of CPU, one thread, medians of {REPEATS} interleaved repeats of {STEPS} steps. "
        + stamp(__file__),
    ]
    (given.out / "cost.json").write_text(json.dumps({"ms": cost, "models": memory}))
    conclude(given, "account-cost", "\n".join(lines))


if __name__ == "__main__":
    main()
