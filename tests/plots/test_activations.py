"""Figures of exchanged activations hold the numbers they are given, in the right places."""

import matplotlib as mpl
import numpy as np
import pytest
import scipy.stats
import xarray as xr
from matplotlib.colors import to_rgba

from dynamics import plots, results

N_LAYERS, N_POS, N_EXAMPLES = 2, 3, 4
TOKENS = ["The", "fox", "ran"]


def found(components=("mlp_out", "ln1.normalized"), measures=("Madrid", "Rome"), seed=0) -> xr.Dataset:
    """Probabilities at two components of each layer and position."""
    rng = np.random.default_rng(seed)
    places = [(c, i, p) for c in components for i in range(N_LAYERS) for p in range(N_POS)]
    sites = {
        "site": [f"{c} {i} @{p}" for c, i, p in places],
        **{name: [place[k] for place in places] for k, name in enumerate(("component", "layer", "pos"))},
        "head": [-1] * len(places),
    }
    references = {name: rng.uniform(0.1, 0.9, (len(measures), N_EXAMPLES)) for name in ("base", "source")}
    examples = {"example": [f"prompt {i}" for i in range(N_EXAMPLES)], "letter": [1, 2, 1, 1]}
    patched = rng.uniform(0.01, 0.9, (len(measures), N_EXAMPLES, len(places)))
    return results.effects(patched, references, examples, sites, list(measures), "probability", "{}")


def panels(figure):
    """The axes with an image, by title."""
    return {
        axes.get_title(): axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"
    }


def test_tiles_are_means_over_examples_by_layer_and_position_in_a_panel_for_each_token():
    dataset = found()
    figure = plots.tiles(dataset, "patched", x_labels=TOKENS)
    assert list(panels(figure)) == ["Madrid", "Rome"]
    first = next(iter(panels(figure).values()))
    rows = [label.get_text() for label in first.get_yticklabels()]
    assert rows == ["mlp_out 0", "ln1.normalized 0", "mlp_out 1", "ln1.normalized 1"]
    assert [label.get_text() for label in first.get_xticklabels()] == TOKENS
    for token, axes in panels(figure).items():
        shown = axes.images[0].get_array()
        for i, row in enumerate(rows):
            for pos in range(N_POS):
                cell = dataset["patched"].sel(measure=token, site=f"{row} @{pos}").mean()
                assert shown[i, pos] == pytest.approx(cell.item())
    limits = {axes.images[0].get_clim() for axes in panels(figure).values()}
    means = dataset["patched"].mean("example")
    assert limits == {(means.min().item(), means.max().item())}
    assert "mean over 4 examples" in figure.get_suptitle()
    assert figure.axes[-1].get_ylabel() == "patched (probability)"


def test_effects_diverge_from_zero_and_a_tile_without_a_site_stays_empty():
    dataset = found(measures=("Rome",)).isel(measure=0)
    kept = dataset.isel(site=dataset["site"].values != "mlp_out 1 @2")
    (axes,) = panels(plots.tiles(kept)).values()
    low, high = axes.images[0].get_clim()
    assert low == -high < 0
    shown = axes.images[0].get_array()
    assert shown.mask[2, 2]
    assert shown.mask.sum() == 1


def test_panels_may_be_for_a_coordinate_of_the_examples():
    dataset = found(measures=("Rome",)).isel(measure=0)
    figure = plots.tiles(dataset, facet="letter")
    assert list(panels(figure)) == ["letter 1", "letter 2"]
    shown = panels(figure)["letter 1"].images[0].get_array()
    own = dataset["effect"].isel(example=[0, 2, 3]).sel(site="mlp_out 1 @2").mean()
    assert shown[2, 2] == pytest.approx(own.item())
    assert "mean over 1 to 3 examples" in figure.get_suptitle()


def test_what_cannot_be_tiled_is_refused():
    dataset = found()
    with pytest.raises(ValueError, match="several values for \\['measure'\\]"):
        plots.tiles(dataset, facet="step")
    with pytest.raises(ValueError, match="no coordinate 'src'"):
        plots.tiles(dataset, x="src")
    with pytest.raises(ValueError, match="several sites are mlp_out 0 at head -1"):
        plots.tiles(dataset, x="head")
    with pytest.raises(ValueError, match="2 labels for positions up to 2"):
        plots.tiles(dataset, x_labels=TOKENS[:2])


def test_bars_are_on_a_logarithmic_axis_with_both_references():
    dataset = found()
    last = dataset.isel(site=dataset["pos"].values == 2)
    figure = plots.bars(last)
    assert [axes.get_title() for axes in figure.axes] == ["Madrid", "Rome"]
    labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert labels == ["mlp_out 0", "ln1.normalized 0", "mlp_out 1", "ln1.normalized 1"]
    for token, axes in zip(("Madrid", "Rome"), figure.axes, strict=True):
        assert axes.get_yscale() == "log"
        expected = [last["patched"].sel(measure=token, site=f"{label} @2").mean().item() for label in labels]
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], expected)
        levels = [line.get_ydata()[0] for line in axes.lines]
        np.testing.assert_allclose(levels, [last[r].sel(measure=token).mean() for r in ("base", "source")])


def test_bars_of_what_is_not_above_zero_or_of_several_positions_are_refused():
    dataset = found()
    with pytest.raises(ValueError, match="not above zero everywhere"):
        plots.bars(dataset.isel(site=dataset["pos"].values == 0).assign(patched=lambda d: d["patched"] - 1))
    with pytest.raises(ValueError, match="several sites are mlp_out 0"):
        plots.bars(dataset)


# --- attention --------------------------------------------------------------------------------------------


def patterns(values) -> xr.Dataset:
    """Attributions of every element of the patterns [example, layer, head, pos, src]."""
    n, *shape = values.shape
    places = list(np.ndindex(*shape))
    coords = {
        "site": [f"attn.pattern L{i}H{j} @{p}<-{s}" for i, j, p, s in places],
        **{name: [place[k] for place in places] for k, name in enumerate(("layer", "head", "pos", "src"))},
    }
    return results.attributions(
        values.reshape(n, -1), None, np.ones(n, dtype=int), {"base": np.zeros(n), "source": np.ones(n)},
        {"example": [f"prompt {i}" for i in range(n)]}, "site", coords, None, "logit", "{}",
    )  # fmt: skip


def test_heads_are_taken_apart_by_sign_and_the_largest_come_first():
    values = np.random.default_rng(0).normal(size=(2, 2, 2, N_POS, N_POS))
    figure = plots.signed_heads(patterns(values), TOKENS, n=4)
    mean = values.mean(0)
    sums = {
        f"L{i}H{j}{sign}": getattr(np, side)(mean[i, j], 0.0).sum()
        for i, j in np.ndindex(2, 2)
        for sign, side in (("+", "maximum"), ("−", "minimum"))
    }
    largest = sorted(sums, key=lambda name: -abs(sums[name]))[:4]
    titles = [title.split()[0] for title in panels(figure)]
    assert titles == largest
    for name, axes in zip(largest, panels(figure).values(), strict=True):
        i, j, side = int(name[1]), int(name[3]), np.maximum if name[4] == "+" else np.minimum
        np.testing.assert_allclose(axes.images[0].get_array(), side(mean[i, j], 0.0))
        assert [label.get_text() for label in axes.get_xticklabels()] == TOKENS
    with pytest.raises(ValueError, match="2 tokens for 3 positions"):
        plots.signed_heads(patterns(values), TOKENS[:2])


def test_a_map_of_attributions_by_layer_and_component_holds_their_means():
    dataset = found(measures=("Rome",)).isel(measure=0)
    last = dataset.isel(site=dataset["pos"].values == 2)
    attribution = last[["base", "source"]].assign(attribution=last["effect"])
    (axes,) = panels(plots.heatmap(attribution, x="component")).values()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mlp_out", "ln1.normalized"]
    shown = axes.images[0].get_array()
    for layer in range(N_LAYERS):
        for i, component in enumerate(("mlp_out", "ln1.normalized")):
            cell = last["effect"].sel(site=f"{component} {layer} @2").mean()
            assert shown[layer, i] == pytest.approx(cell.item())


# --- attribution beside patching --------------------------------------------------------------------------


def test_the_scatter_has_a_point_for_each_site_and_spearmans_rho():
    dataset = found(measures=("Rome",)).isel(measure=0)
    noise = np.random.default_rng(1).normal(0, 0.3, dataset["effect"].shape)
    attribution = dataset[["base", "source"]].assign(attribution=dataset["effect"] + noise)
    figure = plots.attribution_against_patching(attribution, dataset)
    (axes,) = figure.axes
    across = attribution["attribution"].mean("example").values
    up = dataset["effect"].mean("example").values
    points = np.concatenate([c.get_offsets() for c in axes.collections])
    np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(across))
    assert {tuple(p) for p in points.round(9)} == {tuple(p) for p in np.stack([across, up], 1).round(9)}
    rho = scipy.stats.spearmanr(across, up).statistic
    assert f"Spearman ρ = {rho:.2f}" in axes.get_title()
    assert len({to_rgba(c.get_facecolor()[0]) for c in axes.collections}) == 2
    for drawn in axes.collections:  # each label has its own component's points
        own = dataset["component"].values == drawn.get_label()
        np.testing.assert_allclose(np.sort(drawn.get_offsets()[:, 0]), np.sort(across[own]))


def test_the_figures_leave_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    plots.tiles(found())
    assert dict(mpl.rcParams) == before
