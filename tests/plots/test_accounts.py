"""Figures of an account show the Dataset's numbers: running sums, and sums at the margins."""

from __future__ import annotations

import numpy as np
import pytest

from dynamics import plots, results
from tests.results.test_combining_accounts import account

SOURCES = ["Dt3's", "table", "before", "decay"]


def chosen():
    return account(10, SOURCES, [0.5, 1.5, 1.0]).isel(example=0)


def test_the_line_is_the_measures_change_and_the_stack_its_running_sums():
    dataset = chosen()
    figure = plots.account(dataset)
    for kind, axes in zip(("source", "site"), figure.axes, strict=True):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.0, 1.0, 0.5])
        summed = dataset["attribution"].sum("site" if kind == "source" else "source").cumsum("step")
        top = summed.clip(min=0).sum(kind).values
        bottom = summed.clip(max=0).sum(kind).values
        drawn = np.concatenate([c.get_paths()[0].vertices[:, 1] for c in axes.collections])
        assert drawn.max() == pytest.approx(top.max())
        assert drawn.min() == pytest.approx(bottom.min())
        labels = axes.get_legend_handles_labels()[1]
        assert set(dataset[kind].values) <= set(labels)
    assert figure.axes[0].get_ylabel() == "change of Dt3 (logit)"


def test_the_map_has_sums_at_its_margins():
    dataset = chosen()
    axes = plots.account_map(dataset).axes[0]
    cells = dataset["attribution"].sum("step").transpose("site", "source").values
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(drawn[:-1, :-1], cells)
    np.testing.assert_allclose(drawn[-1, :-1], cells.sum(0))
    np.testing.assert_allclose(drawn[:-1, -1], cells.sum(1))
    assert drawn[-1, -1] == pytest.approx(cells.sum())
    assert [t.get_text() for t in axes.get_xticklabels()] == [*SOURCES, "all sources"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["embed", "unembed", "all sites"]


def test_what_is_not_selected_or_not_there_is_said():
    with pytest.raises(ValueError, match=r"several values for \['example'\]"):
        plots.account(account(0, SOURCES, [0.0, 1.0, 2.0]))
    without = chosen().isel(source=0, drop=True)
    assert len(plots.account(without).axes) == 1
    with pytest.raises(ValueError, match="takes one by source"):
        plots.account_map(without)
    assert results.is_account(without)
