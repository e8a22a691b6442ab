"""The map of sites by pairs of checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from dynamics import plots, results, statistics


def grid() -> xr.Dataset:
    """Two sites, into steps 0 and 10 from steps 3, 7 and 9, every cell with an effect of its own."""

    def cell(base: int, source: int) -> xr.Dataset:
        effects = base + source / 10 + np.array([[0.0, 100.0], [0.0, 100.0]])
        return results.effects(
            effects,
            {"base": np.zeros(2), "source": np.ones(2)},
            {"example": ["one", "two"]},
            {"site": ["attn 0", "mlp 0"], "layer": [0, 0]},
            None,
            "logit",
            "{}",
        )

    rows = [results.concat([cell(base, s) for s in (3, 7, 9)], "source_step", [3, 7, 9]) for base in (0, 10)]
    return results.concat(rows, "step", [0, 10])


@pytest.mark.parametrize("summarised", [True, False])
def test_each_column_is_one_checkpoint_put_into_another(summarised):
    dataset = statistics.summarize(grid()) if summarised else grid()
    figure = plots.transfer(dataset)
    axes = figure.axes[0]
    words = [label.get_text() for label in axes.get_xticklabels()]
    assert words == ["3 → 0", "7 → 0", "9 → 0", "3 → 10", "7 → 10", "9 → 10"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attn 0", "mlp 0"]
    values = axes.images[0].get_array()
    np.testing.assert_allclose(values[0], [0.3, 0.7, 0.9, 10.3, 10.7, 10.9])
    np.testing.assert_allclose(values[1], values[0] + 100)
    assert axes.get_xlabel() == "training step, from → into"


def test_one_step_of_either_is_drawn_too():
    figure = plots.transfer(statistics.summarize(grid().isel(step=[1], source_step=[0])))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["3 → 10"]


def test_what_has_no_pairs_is_refused():
    with pytest.raises(
        ValueError, match=r"expected site, step and source_step, and \['source_step'\] is missing"
    ):
        plots.transfer(statistics.summarize(grid().isel(source_step=0)))
