"""Errors of `dynamics import` name the command's options, whatever the library calls them."""

import re

import pytest
import torch
from torch import nn

from checkpoints import Trajectory, TrajectoryError
from dynamics.cli import main
from dynamics.cli.importing import in_words_of_the_command

PYTHON = re.compile(r"\b\w+=|from_\w+\(")
"""An argument or a call of Python."""


def trainers(optimizers=1, **more):
    """A Lightning file whose optimizer has two groups, which no names tell apart."""
    model = nn.Linear(2, 1)
    groups = [{"params": [p]} for p in model.parameters()]
    states = [torch.optim.AdamW(groups).state_dict() for _ in range(optimizers)]
    return {"state_dict": model.state_dict(), "global_step": 3, "optimizer_states": states, **more}


CASES = {
    "no step": (
        "state_dicts",
        {"w": torch.ones(2)},
        "last.pt",
        [],
        "Give --step, a pattern whose first group is",
    ),
    "a key": ("state_dicts", {"model": {"w": torch.ones(2)}}, "m_1.pt", [], "--key model; --ignore leaves"),
    "a prefix": ("state_dicts", {"w": torch.ones(2)}, "m_1.pt", ["--prefix", "net."], "with --prefix net.;"),
    "state dicts": (
        "lightning",
        {"w": torch.ones(2)},
        "m.ckpt",
        [],
        "dynamics import state_dicts reads",
    ),
    "groups": (
        "lightning",
        trainers(),
        "m.ckpt",
        [],
        "import state_dicts PATH --out RUN --key state_dict",
    ),
    "two optimizers": ("lightning", trainers(2), "m.ckpt", [], "PATH --out RUN --key state_dict"),
}


@pytest.mark.parametrize("why", CASES)
def test_an_error_names_the_options(tmp_path, capsys, why):
    kind, contents, name, options, message = CASES[why]
    torch.save(contents, tmp_path / name)
    with pytest.raises(SystemExit) as left:
        main(["import", kind, str(tmp_path / name), "--out", str(tmp_path / "run"), *options])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not PYTHON.search(line), line


def test_an_optimizer_in_another_order_is_said_without_python(tmp_path):
    model = nn.Linear(2, 3)
    saved = trainers()
    saved["state_dict"] = model.state_dict()
    optimizer = torch.optim.AdamW([model.bias, model.weight])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({**saved, "optimizer_states": [optimizer.state_dict()]}, tmp_path / "m.ckpt")
    with pytest.raises(TrajectoryError, match="Give optimizer=") as raised:
        Trajectory.from_lightning(tmp_path / "m.ckpt", tmp_path / "run")
    assert not PYTHON.search(in_words_of_the_command(str(raised.value)))
