"""What opening 200 checkpoints and comparing each with the next costs. About a minute on one core.

Checkpoints of the toy: weights of every matrix, every alias's answers, the residual stream at every position
and every head's attention; the whole process counts towards the peak of memory. CPU time is told beside the
clock's, which other programs on the machine disturb.

    .venv/bin/python scripts/benchmarks/comparison_cost.py --readme
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import xarray as xr

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryWriter
from dynamics.config import StudyConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.into_readme import conclude, stamp


def recorded(folder: Path, config: StudyConfig, n: int) -> None:
    """A run's first steps, every one of them stored."""
    task = dy.tasks.load(config.to_dict())
    recipe = task.recipe()
    optimizer = recipe.optimizer(recipe.model.parameters())
    state = Checkpoint.capture(recipe.model, optimizer, recipe.scheduler(optimizer))
    with TrajectoryWriter.create(folder, config.to_dict()) as writer:
        for step in range(n):
            state = dy.steps.advance(recipe, state, step, task.batch)
            writer.append(state)


def compared(run: Trajectory) -> int:
    """Each checkpoint with the next; how many pairs there were."""
    task = dy.tasks.load(run.config)
    recipe = task.recipe()
    questions, coords = dy.tasks.alias_questions(task)
    matrices, like = dy.sites.matrices(recipe.model), next(iter(questions.values()))
    streams = dy.sites.activations(recipe.model, "blocks.*.hook_resid_post", ("layer", "pos"), like)
    heads = dy.sites.activations(recipe.model, "*hook_pattern", ("layer", "head"), like)

    def neighbours(before: Checkpoint, after: Checkpoint) -> dict[str, xr.Dataset]:
        return dy.compare(before, after, recipe, questions, matrices, coords, streams, heads)

    found = dy.comparison.over_training({2: neighbours}, run, run.steps, recipe, task.batch)
    return found["weights"].sizes["step"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        recorded(Path(folder) / "run", StudyConfig(), given.checkpoints)
        opening = time.perf_counter()
        run = Trajectory.open(Path(folder) / "run")
        opened = time.perf_counter() - opening
        begun, cpu = time.perf_counter(), time.process_time()
        pairs = compared(run)
        took, cpu = time.perf_counter() - begun, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    text = "\n".join(
        [
            f"| {given.checkpoints} checkpoints of the toy | | goal |",
            "|---|---|---|",
            f"| opened | {opened:.3f} s | under 0.2 s |",
            f"| {pairs} neighbours compared | {took:.0f} s ({cpu:.0f} s of CPU) | under 60 s |",
            f"| peak memory of the process | {peak:.2f} GB | under 1 GB |",
            "",
            f"Default toy, {given.threads} threads. {stamp(__file__)}",
        ]
    )
    conclude(given, "comparison", text)


if __name__ == "__main__":
    main()
