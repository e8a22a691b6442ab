"""What notebooks show of values."""

import pytest
import torch
from torch import nn

import dynamics as dy
from checkpoints import html


def test_cells_are_text_and_never_markup():
    assert html.facts("A <b>", [("name", "<script>")]) == (
        "<table><caption style='text-align:left;font-weight:bold'>A &lt;b&gt;</caption>"
        "<tr><td style='text-align:left'>name</td><td style='text-align:left'>&lt;script&gt;</td></tr></table>"
    )


@pytest.fixture
def values(tmp_path):
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with dy.TrajectoryWriter.create(tmp_path / "run", config={"rate": 0.1}) as writer:
        for step in range(20):
            writer.append(dy.Checkpoint.capture(net, optimizer, step=step))
    return {
        "trajectory": dy.Trajectory.open(tmp_path / "run"),
        "checkpoint": dy.Checkpoint.capture(net, optimizer, step=7),
        "recipe": dy.Recipe(net, nn.functional.mse_loss, torch.optim.SGD, max_grad_norm=1.0),
        "contrast": dy.Contrast(torch.zeros(4, 3), torch.ones(4, 3), coords={"alias": "seven"}),
        "sites": dy.sites.rows(nn.Embedding(40, 2), "weight"),
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trajectory", ["20", "0, 1, 2, 3, 4, 5, ..., 14, 15, 16, 17, 18, 19", "rate"]),
        ("checkpoint", ["7 (the state before it)", "2 tensors, 8 numbers", "stored"]),
        ("recipe", ["Linear of 8 parameters", "mse_loss", "SGD", "ByNorm"]),
        ("contrast", ["alias", "seven", "probe"]),
        ("sites", ["40 sites, the first 16", "part of weight"]),
    ],
)
def test_a_notebook_shows_a_noun_as_a_short_table(values, name, words):
    shown = values[name]._repr_html_()
    assert shown.startswith("<table>")
    assert len(shown) < 5000
    for word in words:
        assert word in shown


def test_a_list_of_sites_is_a_list():
    sites = dy.sites.parameters(nn.Linear(3, 2))
    assert sites == list(sites)
    assert [*sites, *sites][:2] == sites
