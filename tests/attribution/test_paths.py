"""attribute_paths beside finite differences and TransformerLens's edge attribution; identities; circuits."""

import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

import dynamics as dy
from dynamics import measures, sites
from dynamics.attribution.circuits import leading_through
from tests.oracles.residual_graph import Graph
from tests.patching.test_paths import as_ours, mean_difference, pair
from tests.zoo.small_models import examples, transformer

MEASURE = measures.logit_difference


def smooth(**changes):
    return transformer(activation="gelu", **changes)


def labelled(dataset: xr.Dataset) -> dict[str, float]:
    return dict(zip(dataset["site"].values.tolist(), dataset["attribution"].values[0].tolist(), strict=True))


@pytest.mark.parametrize("normalization", ["LN", "none"])
def test_first_order_is_transformer_lenss_edge_attribution_over_all_positions(normalization):
    model, contrast = smooth(normalization=normalization).eval(), pair(rows=1)
    found = labelled(dy.attribute_paths(dy.Recipe(model), None, [contrast], sites.paths(model), MEASURE))
    base = contrast.base
    theirs = attribution_patch(
        model,
        contrast.source.tokens,
        base.tokens,
        lambda logits: MEASURE.from_logits(logits[:, int(base.target_pos)], base).mean(),
        EdgeAttributionConfig("edge"),
    )
    sums = dict.fromkeys(found, 0.0)
    for edge, score in theirs.edge_scores.items():
        sums[as_ours(edge)] += score
    assert found == pytest.approx(sums, rel=0, abs=1e-12)
    assert sum(abs(value) > 1e-6 for value in found.values()) > 0.9 * len(found)


def test_first_order_is_the_slope_of_the_graph_written_out():
    """The oracle's activation is ReLU, whose kinks a small difference does not meet."""
    model, contrast = transformer(activation="relu"), pair()
    chosen = sites.paths(model)
    found = labelled(dy.attribute_paths(dy.Recipe(model), None, [contrast], chosen, MEASURE))
    graph, h = Graph(model), 1e-5
    for site in chosen:
        (edge,) = site.edges
        logits = []
        for sign in (1, -1):
            rows = []
            for row, tokens in enumerate(contrast.base.tokens.tolist()):
                ours = graph(tokens)[1][edge[0]]
                theirs = graph(contrast.source.tokens[row].tolist())[1][edge[0]]
                moved = {edge: ours + sign * h * (theirs - ours)}
                rows.append(graph(tokens, moved)[0][int(contrast.base.target_pos[row])])
            logits.append(mean_difference(np.array(rows), contrast.base))
        assert found[site.label] == pytest.approx((logits[0] - logits[1]) / (2 * h), rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_integrated_edges_of_the_embedding_divide_the_whole_difference():
    model, contrasts = smooth(), [pair(0), pair(1)]
    found = dy.attribute_paths(
        dy.Recipe(model), None, contrasts, sites.paths(model), MEASURE, "integrated", tolerance=1e-6
    )
    gap = found["source"] - found["base"]
    total = found["attribution"].sel(site=found["sender"] == "embed").sum("site")
    np.testing.assert_allclose(total - gap, found["residual"], rtol=0, atol=1e-12)
    assert (abs(found["residual"]) < 1e-4 * abs(gap)).all()
    assert (found["nodes"] >= 8).all()


def test_integrated_is_the_mean_of_gradients_along_the_line_of_embeddings():
    model, contrast = smooth(), pair()
    (site,) = sites.paths(model, "L0H1", "L1H0 v")
    found = dy.attribute_paths(
        dy.Recipe(model), None, [contrast], [site], MEASURE, "integrated", tolerance=0.0, max_nodes=16
    )
    for name in ("attn_result", "split_qkv_input"):
        getattr(model, f"set_use_{name}")(True)
    (_, base), (_, source) = (model.run_with_cache(b.tokens) for b in (contrast.base, contrast.source))
    total = 0.0
    for place, weight in zip(*np.polynomial.legendre.leggauss(16), strict=True):
        embedded = base["hook_embed"] + (1 + place) / 2 * (source["hook_embed"] - base["hook_embed"])
        kept = []

        def keep(activation, hook, kept=kept):
            kept.append(activation)

        logits = model.run_with_hooks(
            contrast.base.tokens,
            fwd_hooks=[("hook_embed", lambda a, hook, e=embedded: e), ("blocks.1.attn.hook_v_input", keep)],
        )
        value = MEASURE.from_logits(logits[torch.arange(2), contrast.base.target_pos], contrast.base).mean()
        (gradient,) = torch.autograd.grad(value, kept)
        name = "blocks.0.attn.hook_result"
        total += weight / 2 * float((gradient[:, :, 0] * (source[name] - base[name])[:, :, 1]).sum())
    assert found["attribution"].item() == pytest.approx(total, abs=1e-12)
    assert found["nodes"].item() == 16


def test_reversed_contrasts_negate_the_integrated_attributions():
    model, contrast = smooth(), pair()
    chosen = sites.paths(model)
    there, back = (
        labelled(
            dy.attribute_paths(dy.Recipe(model), None, [c], chosen, MEASURE, "integrated", tolerance=1e-9)
        )
        for c in (contrast, contrast.reversed())
    )
    assert there == pytest.approx({label: -value for label, value in back.items()}, rel=0, abs=1e-9)


def test_a_site_of_several_edges_has_their_sum_and_contrasts_stay_apart():
    model, contrasts = smooth(), [pair(0), pair(1)]
    edges = [site.label for site in sites.paths(model)]
    recipe = dy.Recipe(model)
    each = dy.attribute_paths(recipe, None, contrasts, sites.paths(model), MEASURE)
    joined = dy.attribute_paths(
        recipe, None, contrasts, [sites.together(model, edges[3:20], "some")], MEASURE
    )
    expected = each["attribution"].isel(site=slice(3, 20)).sum("site")
    np.testing.assert_allclose(joined["attribution"].squeeze("site"), expected, rtol=0, atol=1e-12)
    alone = dy.attribute_paths(recipe, None, contrasts[1:], sites.paths(model), MEASURE)
    np.testing.assert_allclose(each["attribution"][1], alone["attribution"][0], rtol=0, atol=1e-12)
    assert not any(name.endswith("_input") for name in model.hook_dict)


def test_a_measure_without_a_gradient_is_refused():
    model = smooth()
    with pytest.raises(ValueError, match="no gradient"):
        dy.attribute_paths(dy.Recipe(model), None, [pair()], sites.paths(model), measures.accuracy)


# --- circuits ---------------------------------------------------------------------------------------------

WEB = [("embed", "L0H0 v"), ("embed", "L0H1 q"), ("L0H0", "L1H0 k"), ("L1H0", "logits"), ("mlp 0", "logits")]
WEB += [("L0H1", "mlp 0"), ("L0H1", "L1H1 v"), ("L1H1", "mlp 1"), ("embed", "mlp 1"), ("mlp 1", "logits")]


def ways(edges):
    """Every way from the embedding to the logits, by walking them all."""
    found = []

    def walk(at, way):
        if at == "logits":
            found.append(way)
        for sender, receiver in edges:
            if sender == at:
                onto = receiver.split(" ")[0] if receiver[0] == "L" else receiver
                walk(onto, [*way, (sender, receiver)])

    walk("embed", [])
    return set(itertools.chain.from_iterable(found))


@pytest.mark.slow
@given(st.sets(st.sampled_from(WEB)))
@examples
def test_what_leads_through_lies_on_some_way(edges):
    assert leading_through(edges) == ways(edges)


def test_a_circuit_is_what_is_strong_and_leads_through():
    model = smooth()
    chosen = sites.paths(model)
    recipe, contrasts = dy.Recipe(model), [pair(0), pair(1)]
    found = dy.attribute_paths(recipe, None, contrasts, chosen, MEASURE)
    assert set(dy.circuit(found, 1e-12)) == {site.label for site in chosen}
    gap = abs(float((found["source"] - found["base"]).mean()))
    strength = abs(found["attribution"].mean("example"))
    share = float(np.sort(strength)[-12] / gap)
    twelve = [site for site in chosen if float(strength.sel(site=site.label)) >= share * gap * (1 - 1e-9)]
    assert len(twelve) == 12
    kept = dy.circuit(found, share * (1 - 1e-9))
    assert {tuple(label.split(" -> ")) for label in kept} == ways([site.edges[0] for site in twelve])
    assert [float(strength.sel(site=label)) for label in kept] == sorted(
        (float(strength.sel(site=label)) for label in kept), reverse=True
    )
    assert dy.circuit(found, 1e6) == []
    assert 0 < len(kept) < len(chosen)
    assert dy.circuit(-found, share * (1 - 1e-9)) == kept  # a measure that falls where the other rises


def test_an_edge_of_exactly_the_threshold_is_part_of_the_circuit():
    direct = xr.Dataset(
        {
            "attribution": (("example", "site"), [[0.5, 0.25]]),
            "source": ("example", [1.0]),
            "base": ("example", [0.0]),
        },
        coords={
            "site": ["embed -> mlp 0", "embed -> logits"],
            "sender": ("site", ["embed", "embed"]),
            "receiver": ("site", ["mlp 0", "logits"]),
        },
    )
    assert dy.circuit(direct, 0.25) == ["embed -> logits"]
    assert dy.circuit(direct, 0.2500001) == []


def test_a_circuit_of_something_else_is_refused():
    model = smooth()
    recipe = dy.Recipe(model)
    whole = [sites.outside(model, [], "all")]
    with pytest.raises(ValueError, match="single paths"):
        dy.circuit(dy.attribute_paths(recipe, None, [pair()], whole, MEASURE), 0.1)
    several = dy.attribute_paths(recipe, None, [pair()], sites.paths(model), {"a": MEASURE, "b": MEASURE})
    with pytest.raises(ValueError, match="select one value"):
        dy.circuit(several, 0.1)
