"""Train a task and keep its trajectory."""

from __future__ import annotations

from collections.abc import Sequence

from dynamics.cli import configs
from dynamics.cli.parsing import Parser
from dynamics.cli.runs import set_threads


def run(words: Sequence[str]) -> None:
    """`dynamics fit --out RUN`; the keys are those of the task that the words name."""
    kind = configs.kind_asked(words)
    parser = Parser(
        prog="dynamics fit",
        usage=f"dynamics fit {configs.USAGE}",
        description="Train alone and keep the trajectory, of the alias task or, by --preset or --task.name, of "
        "another; `dynamics fit --preset NAME --help` shows that task's keys.",
    )
    configs.add_config(parser, kind)
    given = parser.parse_args(list(words))
    set_threads(given.trainer.threads)
    from dynamics import training

    trajectory = training.fit(configs.config_of(given, kind), given.out)
    print(
        f"{len(trajectory)} checkpoints, steps {trajectory.steps[0]} to {trajectory.steps[-1]}, in {given.out}."
    )
