"""Paths of Hugging Face's GPT-2 behind TransformerLens's bridge, beside TransformerLens's own tools on it."""

import numpy as np
import pytest
import torch
from transformer_lens import patching
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

import dynamics as dy
from dynamics import measures, sites
from tests.models.test_bridges import bridge, model, tokenizer  # noqa: F401
from tests.patching.test_paths import as_ours, pair

MEASURE = measures.logit_difference


@pytest.mark.parametrize("part", "qkv")
def test_head_to_head_equals_transformer_lenss_direct_paths(bridge, part):  # noqa: F811
    contrast = pair()
    base, recipe = contrast.base, dy.Recipe(bridge)
    found = dy.patch_paths(recipe, None, [contrast], sites.paths(bridge, "L*H*", f"L*H* {part}"), MEASURE)
    (_, clean), (_, corrupt) = (bridge.run_with_cache(b.tokens) for b in (contrast.source, base))
    rows = torch.arange(2)
    theirs = patching.get_act_patch_direct_path_all_sources(
        bridge,
        base.tokens,
        clean,
        corrupt,
        lambda z: MEASURE.from_logits(z[rows, base.target_pos], base).mean(),
        component=part,
        verbose=False,
    )
    assert found.sizes["site"] == bridge.cfg.n_heads**2 * bridge.cfg.n_layers * (bridge.cfg.n_layers - 1) / 2
    for site in found["site"].values:
        one = found.sel(site=site)
        there = theirs[int(one["sender_layer"]), int(one["sender_head"]), int(one["layer"]), int(one["head"])]
        assert float(one["patched"].squeeze()) == pytest.approx(float(there), abs=1e-5)
    assert abs(found["effect"]).max() > 1e-4
    assert not bridge.cfg.use_split_qkv_input


def test_attributions_are_transformer_lenss_over_all_positions(bridge):  # noqa: F811
    contrast = pair(rows=1)
    base = contrast.base
    found = dy.attribute_paths(dy.Recipe(bridge), None, [contrast], sites.paths(bridge), MEASURE)
    theirs = attribution_patch(
        bridge,
        contrast.source.tokens,
        base.tokens,
        lambda z: MEASURE.from_logits(z[:, int(base.target_pos)], base).mean(),
        EdgeAttributionConfig("edge"),
    )
    sums = dict.fromkeys(found["site"].values.tolist(), 0.0)
    for edge, score in theirs.edge_scores.items():
        sums[as_ours(edge)] += score
    np.testing.assert_allclose(found["attribution"][0], list(sums.values()), rtol=0, atol=1e-6)
    assert abs(found["attribution"]).max() > 1e-4


def test_all_edges_make_the_source_run(bridge):  # noqa: F811
    everything = [sites.outside(bridge, [], "all")]
    found = dy.patch_paths(dy.Recipe(bridge), None, [pair()], everything, MEASURE)
    np.testing.assert_allclose(found["patched"].squeeze(), found["source"].squeeze(), rtol=0, atol=1e-5)
