"""The command line called within this process: what it prints, and the status it leaves with."""

import io
import logging
import subprocess
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch

from dynamics.cli import main

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch  # noqa: F401 - its imports warn of their own accord

TINY = [
    "--preset=smoke",
    "--task.modulus=8",
    "--task.multipliers=[2, 3, 4]",
    "--task.train_multipliers=2",
    "--phases.pretrain.steps=20",
    "--phases.x1.steps=20",
    "--phases.x2.steps=20",
    "--patching.x2_steps=[0, 10]",
    "--schedule.per_decade=2",
    "--schedule.dense=2",
    "--schedule.evaluate_every=4",
]
"""The smoke preset in miniature: four aliases, sixty steps, X2 from step 40."""


def dynamics(*words: object) -> subprocess.CompletedProcess[str]:
    """`dynamics WORDS`, as if it were a process of its own."""
    command, status = [str(word) for word in words], 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, as_a_process(err):
        try:
            main(command)
        except SystemExit as left:
            status = left.code
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def succeed(*words: object) -> str:
    """What a command prints that must not fail."""
    done = dynamics(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def as_a_process(err):
    """What is logged goes to stderr; a command's number of threads is its own."""
    threads, log = torch.get_num_threads(), logging.StreamHandler(err)
    log.setLevel(logging.WARNING)
    logging.getLogger().addHandler(log)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(log)
        torch.set_num_threads(threads)
