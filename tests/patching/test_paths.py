"""patch_paths beside the residual graph written out, TransformerLens's tools, and numbers found by hand."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformer_lens import patching
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
    faithfulness,
)

import dynamics as dy
from dynamics import measures, sites
from dynamics.batch import Batch
from dynamics.config import ToyConfig
from dynamics.models.toy import ToyTransformer
from dynamics.sites import SiteError
from tests.oracles.residual_graph import Graph, patched
from tests.zoo.cases import first_quick
from tests.zoo.small_models import tokens, transformer

EDGES = 2 * 3 * 1 + 3 + 2 * 3 * 4 + 6 + 7
"""Of two layers of two heads: from 1, 3, 4, 6 and 7 senders to heads' q, k, v, MLP, heads, MLP and logits."""


def toy(**changes):
    return transformer(activation="relu", **changes)


def pair(seed: int = 0, rows: int = 2) -> dy.Contrast:
    base = tokens(10 + seed, rows)
    source = dataclasses.replace(base, tokens=tokens(20 + seed, rows).tokens)
    return dy.Contrast(base, source, coords={"example": f"pair {seed}"})


def mean_difference(logits: np.ndarray, batch: Batch) -> float:
    rows = np.arange(len(logits))
    wrong = logits[rows[:, None], batch.distractors.numpy()].mean(1)
    return float((logits[rows, batch.targets.numpy()] - wrong).mean())


# --- the graph --------------------------------------------------------------------------------------------


def test_every_edge_is_there_once_and_leads_forward():
    found = sites.paths(toy())
    assert len({site.label for site in found}) == len(found) == EDGES
    labels = {site.label for site in found}
    assert {"embed -> L0H0 q", "L0H1 -> mlp 0", "mlp 0 -> L1H0 v", "L1H1 -> logits"} <= labels
    assert not {"L0H0 -> L0H1 q", "mlp 0 -> mlp 0", "L1H0 -> L1H0 k", "L1H0 -> mlp 0"} & labels


@pytest.mark.parametrize(
    ("senders", "receivers", "n"),
    [
        ("L*H*", "L*H* [qkv]", 2 * 6),
        ("*", "L1H1 q", 4),
        ("L*H*", "logits", 4),
        ("embed", "*", 6 + 1 + 6 + 1 + 1),
    ],
)
def test_globs_choose_senders_and_receivers(senders, receivers, n):
    found = sites.paths(toy(), senders, receivers)
    assert len(found) == n
    assert all(dict(s.coords)["receiver"] == s.edges[0][1] for s in found)


def test_coordinates_are_the_receivers_and_name_the_sender():
    (site,) = sites.paths(toy(), "L0H1", "L1H0 k")
    assert site.coords == {
        "level": "paths",
        "component": "k",
        "layer": 1,
        "head": 0,
        "sender": "L0H1",
        "sender_layer": 0,
        "sender_head": 1,
        "receiver": "L1H0 k",
    }
    assert site.covers == {"blocks.1.attn.hook_k_input": (slice(None), slice(None), 0)}


def test_one_receiver_of_a_model_of_attention_alone():
    found = sites.paths(toy(attn_only=True), "*", "logits")
    assert [site.edges[0][0] for site in found] == ["embed", "L0H0", "L0H1", "L1H0", "L1H1"]


# --- the slow oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"normalization": "none"}, {"attn_only": True}], ids=str)
def test_the_oracle_is_the_model(changes):
    model, batch = toy(**changes), tokens(3)
    graph = Graph(model)
    for row in batch.tokens:
        np.testing.assert_allclose(graph(row.tolist())[0], model(row[None])[0].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes", first_quick([{}, {"normalization": "none"}, {"attn_only": True}]), ids=str
)
def test_every_edge_is_patched_as_in_the_graph_written_out(changes):
    model, contrasts = toy(**changes), [pair(0), pair(1)]
    chosen = sites.paths(model)
    found = dy.patch_paths(dy.Recipe(model), None, contrasts, chosen, measures.logit_difference)
    graph = Graph(model)
    for i, contrast in enumerate(contrasts):
        expected = [
            mean_difference(patched(graph, contrast.base, contrast.source, site.edges), contrast.base)
            for site in chosen
        ]
        np.testing.assert_allclose(found["patched"][i], expected, rtol=0, atol=1e-12)
    moving = ~np.isclose(found["effect"].values, 0, atol=1e-9)
    assert moving.mean() > 0.9


def test_a_set_of_edges_is_patched_as_in_the_graph_written_out():
    model, contrast = toy(), pair()
    labels = [site.label for site in sites.paths(model)]
    sets = [labels[::2], labels[1::3], ["embed -> L0H1 v"], labels]
    chosen = [sites.together(model, edges, f"set {i}") for i, edges in enumerate(sets)]
    found = dy.patch_paths(dy.Recipe(model), None, [contrast], chosen, measures.logit_difference)
    graph = Graph(model)
    expected = [
        mean_difference(patched(graph, contrast.base, contrast.source, site.edges), contrast.base)
        for site in chosen
    ]
    np.testing.assert_allclose(found["patched"][0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("values", ["zero", "mean"])
def test_ablated_edges_are_those_of_the_graph_written_out(values):
    model, contrasts = toy(), [pair(0), pair(1)]
    chosen = sites.paths(model, "L0H*", "L1H0 [qv]")
    found = dy.patch_paths(
        dy.Recipe(model), None, contrasts, chosen, measures.logit_difference, values=values
    )
    graph = Graph(model)
    written = [graph(row)[1] for c in contrasts for row in c.source.tokens.tolist()]
    mean = {sender: np.mean([w[sender] for w in written], 0) for sender in written[0]}
    new = {s: np.stack([m if values == "mean" else 0 * m] * 2) for s, m in mean.items()}
    for i, c in enumerate(contrasts):
        expected = [mean_difference(patched(graph, c.base, c.source, s.edges, new), c.base) for s in chosen]
        np.testing.assert_allclose(found["patched"][i], expected, rtol=0, atol=1e-12)


# --- by hand ----------------------------------------------------------------------------------------------


def by_hand() -> ToyTransformer:
    """Two layers of one head that looks everywhere alike, three dimensions, no norms, no MLPs.

    Token t is e_t. The first head copies dimension 0 into dimension 1, twice; the second copies dimension 1 into
    dimension 2, three times; logits are the residual stream.
    """
    shapes = {"n_layers": 2, "n_heads": 1, "d_model": 3, "d_head": 1, "d_mlp": 1, "n_ctx": 2}
    config = ToyConfig(**shapes, attn_only=True, normalization="none", dtype="float64", seed=0)
    model = ToyTransformer(config, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E.copy_(torch.eye(3))
        model.unembed.W_U.copy_(torch.eye(3))
        for layer, times in ((0, 2.0), (1, 3.0)):
            model.blocks[layer].attn.W_V[0, layer, 0] = 1
            model.blocks[layer].attn.W_O[0, 0, layer + 1] = times
    return model


def test_numbers_found_by_hand():
    model = by_hand()
    # Base 2 2, source 2 0, at the last position. In the source run the first head writes 2 · (0 + 1)/2 = 1 into
    # dimension 1 at position 1, nothing at position 0; the second 3 · (0 + 1)/2 = 1.5 into dimension 2.
    base, source = (Batch(torch.tensor([t]), torch.tensor([1]), torch.tensor([2])) for t in ([2, 2], [2, 0]))
    recipe, contrast = dy.Recipe(model), dy.Contrast(base, source)
    found = dy.patch_paths(recipe, None, [contrast], sites.paths(model), measures.correct_logit)
    effect = dict(zip(found["site"].values.tolist(), found["effect"].values[0].tolist(), strict=True))
    assert found["base"].item() == 1.0  # token 2 itself
    assert found["source"].item() == 1.5
    assert effect["embed -> L0H0 v"] == pytest.approx(1.5)  # all of what the heads do
    assert effect["L0H0 -> L1H0 v"] == pytest.approx(1.5)
    assert effect["embed -> L1H0 v"] == 0  # dimension 1 holds no token
    assert effect["embed -> logits"] == pytest.approx(-1)  # token 2 is no longer there
    assert effect["L1H0 -> logits"] == pytest.approx(1.5)
    assert effect["L0H0 -> logits"] == 0  # dimension 1 is another logit
    rest = {label for label in effect if label.endswith((" q", " k"))}
    assert len(rest) == 6
    assert all(effect[label] == 0 for label in rest)
    answer = sites.together(model, ["L0H0 -> L1H0 v", "L1H0 -> logits"], "both")
    both = dy.patch_paths(recipe, None, [contrast], [answer], measures.correct_logit)
    assert float(both["effect"].squeeze()) == pytest.approx(
        1.5
    )  # the second edge reads the source run's, once


# --- TransformerLens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", "qkv")
def test_head_to_head_equals_transformer_lenss_direct_paths(part):
    model, contrast = toy(), pair()
    found = dy.patch_paths(
        dy.Recipe(model),
        None,
        [contrast],
        sites.paths(model, "L*H*", f"L*H* {part}"),
        measures.logit_difference,
    )
    (_, clean), (_, corrupt) = (model.run_with_cache(b.tokens) for b in (contrast.source, contrast.base))
    rows = torch.arange(2)
    theirs = patching.get_act_patch_direct_path_all_sources(
        model.eval(),
        contrast.base.tokens,
        clean,
        corrupt,
        lambda logits: measures.logit_difference.from_logits(
            logits[rows, contrast.base.target_pos], contrast.base
        ).mean(),
        component=part,
        verbose=False,
    )
    assert found.sizes["site"] == 4
    for site in found["site"].values:
        one = found.sel(site=site)
        there = theirs[int(one["sender_layer"]), int(one["sender_head"]), int(one["layer"]), int(one["head"])]
        assert float(one["patched"].squeeze()) == pytest.approx(
            float(there), abs=1e-5
        )  # they keep single precision


def as_ours(edge) -> str:
    sender, receiver = edge
    writes = {
        "embed": "embed",
        "attn_head_out": f"L{sender.layer}H{sender.head}",
        "mlp_out": f"mlp {sender.layer}",
    }
    reads = {f"{part}_input": f"L{receiver.layer}H{receiver.head} {part}" for part in "qkv"}
    reads |= {"mlp_in": f"mlp {receiver.layer}", "logits": "logits"}
    return f"{writes[sender.kind]} -> {reads[receiver.kind]}"


@pytest.mark.parametrize("n", [0, 9, 30])
def test_a_circuit_recovers_what_transformer_lens_says(n):
    model, contrast = toy().eval(), pair(rows=1)
    labels = [site.label for site in sites.paths(model)]
    circuit = [
        labels[i] for i in torch.randperm(EDGES, generator=torch.Generator().manual_seed(n))[:n].tolist()
    ]
    clean, corrupt = contrast.source, contrast.base

    def metric(logits):
        return measures.logit_difference.from_logits(logits[:, int(clean.target_pos)], clean).mean()

    every = attribution_patch(model, clean.tokens, corrupt.tokens, metric, EdgeAttributionConfig("edge"))
    kept = [edge for edge in every.edge_scores if as_ours(edge) in circuit]
    assert len(kept) == 4 * n  # at every position
    theirs = faithfulness(model, clean.tokens, corrupt.tokens, metric, kept)
    site = sites.outside(model, circuit, "outside")
    ours = dy.patch_paths(dy.Recipe(model), None, [contrast.reversed()], [site], measures.logit_difference)
    gap = ours["base"] - ours["source"]
    assert float(((ours["patched"] - ours["source"]) / gap).squeeze()) == pytest.approx(
        theirs.recovered, abs=1e-10
    )


# --- identities -------------------------------------------------------------------------------------------


def test_all_edges_make_the_source_run_and_no_difference_makes_none():
    model, contrast = toy(), pair()
    everything = sites.outside(model, [], "all")
    recipe = dy.Recipe(model)
    found = dy.patch_paths(recipe, None, [contrast], [everything], measures.logit_difference)
    np.testing.assert_allclose(found["patched"].squeeze(), found["source"].squeeze(), rtol=0, atol=1e-12)
    same = dy.Contrast(contrast.base, contrast.base)
    found = dy.patch_paths(recipe, None, [same], sites.paths(model), measures.logit_difference)
    assert not found["effect"].values.any()


def test_all_edges_out_of_a_head_are_that_heads_output():
    model, contrast = toy(), pair()
    out = sites.together(model, [s.label for s in sites.paths(model, "L0H1")], "out of L0H1")
    recipe = dy.Recipe(model)
    by_paths = dy.patch_paths(recipe, None, [contrast], [out], measures.logit_difference)
    like = contrast.base
    (head,) = [
        s for s in sites.activations(model, "blocks.0.attn.hook_z", ("head",), like) if s.coords["head"] == 1
    ]
    by_head = dy.patch_activations(recipe, None, [contrast], [head], measures.logit_difference)
    np.testing.assert_allclose(by_paths["patched"], by_head["patched"], rtol=0, atol=1e-12)
    assert abs(float(by_head["effect"].squeeze())) > 1e-3


def test_several_measures_and_contrasts_of_other_lengths_are_those_alone():
    model = toy()
    short = dataclasses.replace(
        pair(1).base, tokens=pair(1).base.tokens[:, :3], target_pos=torch.tensor([1, 2])
    )
    shorter = dy.Contrast(
        short, dataclasses.replace(short, tokens=short.tokens.flip(0)), coords={"example": "short"}
    )
    chosen, recipe = sites.paths(model, "embed", "L* v"), dy.Recipe(model)
    asked = {"difference": measures.logit_difference, "nats": measures.correct_log_prob}
    both = dy.patch_paths(recipe, None, [pair(), shorter], chosen, asked)
    for name, measure in asked.items():
        for contrast in (pair(), shorter):
            alone = dy.patch_paths(recipe, None, [contrast], chosen, measure)
            label = contrast.coords["example"]
            np.testing.assert_allclose(
                both["patched"].sel(measure=name, example=label), alone["patched"][0], rtol=0, atol=1e-12
            )


def test_the_model_is_as_it_was():
    model = toy()
    model.set_use_attn_result(True)
    model.blocks[0].train()
    before, hooks = copy.deepcopy(model.state_dict()), set(model.hook_dict)
    dy.patch_paths(dy.Recipe(model), None, [pair()], sites.paths(model), measures.correct_logit)
    assert set(model.hook_dict) == hooks
    assert (model.cfg.use_attn_result, model.cfg.use_split_qkv_input) == (True, False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(hook.fwd_hooks or hook._forward_hooks for hook in model.hook_dict.values())


def test_switches_are_off_again_after_an_error():
    model = toy()

    def fails(model, batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        dy.patch_paths(dy.Recipe(model), None, [pair()], sites.paths(model), fails)
    assert not any(name.endswith(("_input", "result", "mlp_in")) for name in model.hook_dict)


def test_factors_are_the_same_with_the_switches_on():
    model, on = toy(), toy()
    for name in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        getattr(on, f"set_use_{name}")(True)
    contrast = dataclasses.replace(pair(rows=3), probe=tokens(5))
    found = []
    for one in (model, on):
        recipe = dy.Recipe(one, measures.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1))
        found.append(dy.patch_factors(recipe, None, [contrast], sites.matrices(one), measures.correct_logit))
    np.testing.assert_allclose(found[0]["patched"], found[1]["patched"], rtol=0, atol=1e-12)


# --- errors -----------------------------------------------------------------------------------------------


def test_errors_say_what_there_is():
    model, recipe = toy(), dy.Recipe(toy())
    with pytest.raises(SiteError, match=r"no path leads from 'L1H0' to 'L0H0 q'\. Senders are embed, L0H0"):
        sites.paths(model, "L1H0", "L0H0 q")
    with pytest.raises(SiteError, match="has no switches set_use_attn_result"):
        sites.paths(torch.nn.Linear(2, 2))
    with pytest.raises(SiteError, match=r"is no path\. Make such sites with sites\.paths"):
        dy.patch_paths(recipe, None, [pair()], sites.layers(model), measures.correct_logit)
    with pytest.raises(SiteError, match="L7H0 -> logits is no path"):
        sites.together(model, ["L7H0 -> logits"], "wrong")
    with pytest.raises(SiteError, match="edges must differ"):
        sites.together(model, ["L0H0 -> logits"] * 2, "twice")
    with pytest.raises(SiteError, match="L7H0 -> logits is no path"):
        sites.outside(model, ["L7H0 -> logits"], "wrong")
    with pytest.raises(SiteError, match="there are none"):
        sites.outside(model, [site.label for site in sites.paths(model)], "nothing")
    deeper = sites.paths(transformer(n_layers=3), "L1H0", "L2H1 q")
    with pytest.raises(SiteError, match="nothing leads from 'L1H0' to 'L2H1 q' in this model"):
        dy.patch_paths(recipe, None, [pair()], deeper, measures.correct_logit)
    with pytest.raises(ValueError, match="was given no sites"):
        dy.patch_paths(recipe, None, [pair()], [], measures.correct_logit)
    with pytest.raises(SiteError, match="no submodule with an output"):
        dy.patch_activations(
            recipe, None, [pair()], sites.paths(model, "L0H0", "L1H0 q"), measures.correct_logit
        )
