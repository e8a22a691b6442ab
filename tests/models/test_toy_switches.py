"""TransformerLens's switches of single paths: what they add, that they change nothing, that its tools then run."""

import copy
from itertools import chain, combinations

import pytest
import torch
from transformer_lens import patching
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
    faithfulness,
)

SWITCHES = {
    "use_split_qkv_input": [f"blocks.{layer}.attn.hook_{part}_input" for layer in (0, 1) for part in "qkv"],
    "use_attn_result": [f"blocks.{layer}.attn.hook_result" for layer in (0, 1)],
    "use_hook_mlp_in": [f"blocks.{layer}.hook_mlp_in" for layer in (0, 1)],
}
CLEAN, CORRUPT = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 4, 5]])


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 1]).mean()


def switched(model, *names, on=True):
    for name in names:
        getattr(model, f"set_{name}")(on)
    return model


@pytest.mark.parametrize("normalization", ["LN", "RMS", "none"])
@pytest.mark.parametrize(
    "names", list(chain.from_iterable(combinations(SWITCHES, n) for n in (1, 2, 3))), ids="+".join
)
def test_switches_add_their_hooks_and_leave_the_logits(toy, tokens, names, normalization):
    plain, model = (toy(normalization=normalization) for _ in range(2))
    switched(model, *names)
    added = {hook for name in names for hook in SWITCHES[name]}
    assert set(model.hook_dict) == set(plain.hook_dict) | added
    assert set(model.state_dict()) == set(plain.state_dict())
    with torch.no_grad():
        expected, (logits, cache) = plain(tokens), model.run_with_cache(tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert set(cache) == set(model.hook_dict)
    assert {name for name in SWITCHES if getattr(model.cfg, name)} == set(names)


def test_switched_off_again_a_model_gives_the_bits_it_gave(toy, tokens):
    model = toy()
    with torch.no_grad():
        before, hooks = model(tokens), set(model.hook_dict)
        switched(model, *SWITCHES)
        switched(model, *SWITCHES, on=False)
        assert torch.equal(model(tokens), before)
    assert set(model.hook_dict) == hooks == set(toy().hook_dict)
    assert not any(getattr(model.cfg, name) for name in SWITCHES)


def test_what_the_new_hooks_hold_is_what_is_read_and_written(toy, tokens):
    model = switched(toy(), *SWITCHES)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for layer in (0, 1):
        block, attn = f"blocks.{layer}.", model.blocks[layer].attn
        resid = cache[f"{block}hook_resid_pre"]
        for part in "qkv":
            read = cache[f"{block}attn.hook_{part}_input"]
            assert torch.equal(read, torch.stack([resid] * 2, 2))
        result = cache[f"{block}attn.hook_result"]
        torch.testing.assert_close(result[:, :, 1], cache[f"{block}attn.hook_z"][:, :, 1] @ attn.W_O[1])
        torch.testing.assert_close(result.sum(2) + attn.b_O, cache[f"{block}hook_attn_out"])
        assert torch.equal(cache[f"{block}hook_mlp_in"], cache[f"{block}hook_resid_mid"])


@pytest.mark.parametrize("part", "qkv")
def test_one_heads_input_reaches_that_heads_projection_alone(toy, tokens, part):
    model = switched(toy(), *SWITCHES)

    def shifted(activation, hook):
        activation[:, :, 1] += torch.arange(4.0)
        return activation

    with torch.no_grad():
        _, before = model.run_with_cache(tokens)
        with model.hooks([(f"blocks.1.attn.hook_{part}_input", shifted)]):
            _, after = model.run_with_cache(tokens)
    for other in "qkv":
        name = f"blocks.1.attn.hook_{other}"
        assert torch.equal(before[name][:, :, 0], after[name][:, :, 0])
        assert torch.equal(before[name][:, :, 1], after[name][:, :, 1]) == (other != part)


def test_a_hook_point_stays_when_it_is_asked_for_twice_and_goes_with_copies(toy):
    model = switched(toy(), "use_attn_result")
    point = model.blocks[0].attn.hook_result
    assert switched(model, "use_attn_result").blocks[0].attn.hook_result is point
    assert copy.deepcopy(model).hook_dict.keys() == model.hook_dict.keys()


def test_a_model_of_attention_alone_has_no_mlp_to_read(toy, tokens):
    plain, model = toy(attn_only=True), switched(toy(attn_only=True), *SWITCHES)
    assert not any("mlp" in name for name in model.hook_dict)
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=1e-12)


# --- TransformerLens's tools ------------------------------------------------------------------------------


def test_edge_attribution_runs_and_its_edges_sum_to_the_nodes(toy):
    model = toy()
    hooks = set(model.hook_dict)
    edges = attribution_patch(model, CLEAN, CORRUPT, metric, EdgeAttributionConfig("edge"))
    nodes = attribution_patch(model, CLEAN, CORRUPT, metric)
    assert len(edges.edge_scores) == 4 * ((6 + 3) + (6 * 4 + 6) + 7)
    assert max(map(abs, edges.edge_scores.values())) > 1e-3
    for node, score in nodes.node_scores.items():
        assert edges.node_scores[node] == pytest.approx(score, rel=0, abs=1e-12)
    assert set(model.hook_dict) == hooks


def test_direct_path_patching_runs_and_adds_the_heads_write_to_one_input(toy):
    model = toy()
    (_, clean), (_, corrupt) = (model.run_with_cache(tokens) for tokens in (CLEAN, CORRUPT))
    found = patching.get_act_patch_direct_path_all_sources(
        model, CORRUPT, clean, corrupt, metric, component="v", verbose=False
    )
    switched(model, *SWITCHES)
    write = model.run_with_cache(CLEAN)[1]["blocks.0.attn.hook_result"][:, :, 1]
    write = write - model.run_with_cache(CORRUPT)[1]["blocks.0.attn.hook_result"][:, :, 1]

    def add(activation, hook):
        activation[:, :, 0] += write
        return activation

    expected = metric(model.run_with_hooks(CORRUPT, fwd_hooks=[("blocks.1.attn.hook_v_input", add)]))
    assert found[0, 1, 1, 0].item() == pytest.approx(expected.item(), abs=1e-6)  # it keeps single precision
    assert found[0, 1, 1, 0].item() != pytest.approx(metric(model(CORRUPT)).item(), abs=1e-4)


def test_faithfulness_runs_and_the_whole_graph_recovers_everything(toy):
    model = toy()
    edges = list(attribution_patch(model, CLEAN, CORRUPT, metric, EdgeAttributionConfig("edge")).edge_scores)
    assert faithfulness(model, CLEAN, CORRUPT, metric, edges).recovered == pytest.approx(1)
    assert faithfulness(model, CLEAN, CORRUPT, metric, []).recovered == pytest.approx(0)
    half = faithfulness(model, CLEAN, CORRUPT, metric, edges[::2])
    assert abs(half.recovered) > 1e-3
    assert abs(half.recovered - 1) > 1e-3
