"""TransformerLens's own tools run on the toy transformer unchanged, and are right on it."""

import numpy as np
import pytest
import torch
from transformer_lens import patching
from transformer_lens.tools.analysis.attribution_patching import Node, attribution_patch

from tests.oracles.transformer_by_loops import ByLoops

CLEAN, CORRUPT = torch.tensor([[0, 1, 2, 3], [5, 5, 0, 4]]), torch.tensor([[0, 1, 4, 3], [5, 5, 1, 4]])
"""Two pairs of rows that differ at position 2 alone."""


def metric(logits):
    """Logit of token 3 less that of token 1 at the last position, meaned over rows; torch or numpy."""
    return (logits[:, -1, 3] - logits[:, -1, 1]).mean()


HOOKS = ["hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized"]
BLOCK_HOOKS = [
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"),
    *(f"{ln}.hook_{name}" for ln in ("ln1", "ln2") for name in ("scale", "normalized")),
    *(f"attn.hook_{name}" for name in ("q", "k", "v", "attn_scores", "pattern", "z")),
    *("mlp.hook_pre", "mlp.hook_post"),
]


@pytest.mark.parametrize("attn_only", [False, True])
@pytest.mark.parametrize("normalization", ["LN", "none"])
def test_hook_names_are_exactly_transformer_lenss(toy, normalization, attn_only):
    expected = {*HOOKS, *(f"blocks.{layer}.{name}" for layer in (0, 1) for name in BLOCK_HOOKS)}
    if normalization == "none":
        expected = {name for name in expected if "ln" not in name}
    if attn_only:
        absent = ("ln2.", "mlp", "resid_mid")
        expected = {name for name in expected if not any(part in name for part in absent)}
    model = toy(normalization=normalization, attn_only=attn_only)
    assert set(model.hook_dict) == expected
    assert all(hook.name == name for name, hook in model.hook_dict.items())


@pytest.mark.parametrize("attn_only", [False, True])
@pytest.mark.parametrize("normalization", ["LN", "RMS", "none"])
def test_run_with_cache_holds_every_activation_of_plain_loops(toy, tokens, normalization, attn_only):
    model = toy(normalization=normalization, attn_only=attn_only)
    slow = ByLoops(model)
    slow(tokens)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    assert set(cache) == set(slow.kept) == set(model.hook_dict)
    for name, value in slow.kept.items():
        np.testing.assert_allclose(cache[name].numpy(), value, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", [*HOOKS, *(f"blocks.0.{name}" for name in BLOCK_HOOKS)])
def test_what_a_hook_returns_is_what_the_model_goes_on_with(toy, tokens, name):
    model = toy()
    kept = ByLoops(model)
    kept(tokens)
    changed = kept.kept[name] * 1.5 + 0.25
    with torch.no_grad():
        hooked = model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda value, hook: torch.from_numpy(changed))]
        )
        assert (hooked - model(tokens)).abs().max() > 1e-4
    np.testing.assert_allclose(hooked.numpy(), ByLoops(model, {name: changed})(tokens), rtol=0, atol=1e-11)


def test_a_backward_signal_set_to_zero_zeroes_the_gradients_upstream_of_it_alone(toy, tokens):
    model = toy()
    model.add_hook("blocks.1.hook_resid_pre", lambda signal, hook: (torch.zeros_like(signal),), dir="bwd")
    metric(model(tokens)).backward()
    upstream = {n for n, p in model.named_parameters() if n.startswith(("embed", "pos_embed", "blocks.0"))}
    assert {n for n, p in model.named_parameters() if not p.grad.any()} >= upstream
    assert all(
        p.grad.any() for n, p in model.named_parameters() if n not in upstream and not n.endswith("b_K")
    )


# --- activation patching ----------------------------------------------------------------------------------

SWEEPS = {
    "resid_pre": ("hook_resid_pre", "layer pos"),
    "resid_mid": ("hook_resid_mid", "layer pos"),
    "attn_out": ("hook_attn_out", "layer pos"),
    "mlp_out": ("hook_mlp_out", "layer pos"),
    "attn_head_out_by_pos": ("attn.hook_z", "layer pos head"),
    "attn_head_q_by_pos": ("attn.hook_q", "layer pos head"),
    "attn_head_k_by_pos": ("attn.hook_k", "layer pos head"),
    "attn_head_v_by_pos": ("attn.hook_v", "layer pos head"),
    "attn_head_out_all_pos": ("attn.hook_z", "layer :pos head"),
    "attn_head_q_all_pos": ("attn.hook_q", "layer :pos head"),
    "attn_head_k_all_pos": ("attn.hook_k", "layer :pos head"),
    "attn_head_v_all_pos": ("attn.hook_v", "layer :pos head"),
    "attn_head_pattern_by_pos": ("attn.hook_pattern", "layer head pos"),
    "attn_head_pattern_all_pos": ("attn.hook_pattern", "layer head"),
    "attn_head_pattern_dest_src_pos": ("attn.hook_pattern", "layer head pos pos"),
}
"""Of each `get_act_patch_*`: the hook, and what the axes of its result range over (`:` is taken whole)."""

SIZES = {"layer": 2, "pos": 4, "head": 2}


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS)
def test_activation_patching_equals_plain_loops_with_that_slice_replaced(toy, sweep):
    model = toy(activation="gelu")
    hook, axes = SWEEPS[sweep][0], SWEEPS[sweep][1].split()
    with torch.no_grad():
        _, cache = model.run_with_cache(CLEAN)
        ours = getattr(patching, f"get_act_patch_{sweep}")(model, CORRUPT, cache, metric)
    clean, corrupt = ByLoops(model), ByLoops(model)
    clean(CLEAN)
    corrupt(CORRUPT)
    swept = [SIZES[axis] for axis in axes if not axis.startswith(":")]
    assert tuple(ours.shape) == tuple(swept)
    for index in np.ndindex(*swept):
        position = iter(index)
        layer, *where = (slice(None) if axis.startswith(":") else next(position) for axis in axes)
        name = f"blocks.{layer}.{hook}"
        patched = corrupt.kept[name].copy()
        patched[(slice(None), *where)] = clean.kept[name][(slice(None), *where)]
        expected = metric(ByLoops(model, {name: patched})(CORRUPT))
        assert ours[index].item() == pytest.approx(expected, abs=1e-5), index  # it stores float32


def test_patching_the_whole_first_residual_stream_reproduces_the_clean_metric(toy):
    model = toy()
    with torch.no_grad():
        logits, cache = model.run_with_cache(CLEAN)
        by_position = patching.get_act_patch_resid_pre(model, CORRUPT, cache, metric)
        everywhere = model.run_with_hooks(
            CORRUPT, fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: cache[hook.name])]
        )
        corrupt = model(CORRUPT)
    assert torch.equal(everywhere, logits)
    expected = [metric(corrupt), metric(corrupt), metric(logits), metric(corrupt)]  # they differ at 2 alone
    torch.testing.assert_close(by_position[0], torch.stack(expected).float())
    assert (metric(logits) - metric(corrupt)).abs() > 1e-3


def test_patching_leaves_no_hook_and_no_weight_behind(toy):
    model = toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits, cache = model.run_with_cache(CLEAN)
        patching.get_act_patch_block_every(model, CORRUPT, cache, metric)
        patching.get_act_patch_attn_head_all_pos_every(model, CORRUPT, cache, metric)
        assert torch.equal(model(CLEAN), logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(hook.fwd_hooks or hook.bwd_hooks for hook in model.hook_dict.values())


def test_a_hook_that_edits_its_activation_in_place_never_edits_a_weight(toy):
    model = toy()
    before = model.pos_embed.W_pos.detach().clone()
    with torch.no_grad():
        model.run_with_hooks(CLEAN[:1], fwd_hooks=[("hook_pos_embed", lambda value, hook: value.zero_())])
    assert torch.equal(model.pos_embed.W_pos, before)


def test_a_cached_activation_outlives_a_change_of_the_weights(toy):
    model = toy()
    _, cache = model.run_with_cache(CLEAN)
    before = {name: value.clone() for name, value in cache.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert [name for name, value in cache.items() if not torch.equal(value, before[name])] == []


# --- attribution patching ---------------------------------------------------------------------------------


def node_slice(node: Node) -> tuple[object, ...]:
    return (slice(None), node.position, *(() if node.head is None else (node.head,)))


def exact_effect(model, clean_cache, node: Node) -> float:
    def patch(value, hook):
        value = value.clone()
        value[node_slice(node)] = clean_cache[hook.name][node_slice(node)]
        return value

    with torch.no_grad():
        patched = model.run_with_hooks(CORRUPT[:1], fwd_hooks=[(node.hook_name, patch)])
        return float(metric(patched) - metric(model(CORRUPT[:1])))


def test_first_order_attribution_equals_the_exact_effect_as_the_difference_vanishes(toy):
    model = toy(activation="gelu")
    with torch.no_grad():  # the two tokens that tell clean from corrupt embed almost alike
        step = torch.linspace(-1, 1, 4, dtype=torch.float64)
        model.embed.W_E[CLEAN[0, 2]] = model.embed.W_E[CORRUPT[0, 2]] + 1e-6 * step
        _, cache = model.run_with_cache(CLEAN[:1])
    scores = attribution_patch(model, CLEAN[:1], CORRUPT[:1], metric).node_scores
    assert len(scores) == 4 + 2 * 4 * (2 + 1)
    moved = {node: exact_effect(model, cache, node) for node in scores}
    assert sum(abs(effect) > 1e-9 for effect in moved.values()) >= 8
    for node, effect in moved.items():
        assert scores[node] == pytest.approx(effect, rel=1e-3, abs=1e-12), node


def test_attribution_is_exact_where_the_model_is_linear_behind_the_node(toy):
    model = toy(normalization="none", n_layers=1)
    scores = attribution_patch(model, CLEAN[:1], CORRUPT[:1], metric).node_scores
    with torch.no_grad():
        _, cache = model.run_with_cache(CLEAN[:1])
    last = [node for node in scores if node.kind == "mlp_out"]
    assert any(abs(scores[node]) > 1e-3 for node in last)
    for node in last:
        assert scores[node] == pytest.approx(exact_effect(model, cache, node), abs=1e-12)


def test_attribution_of_a_batch_is_the_mean_over_its_pairs(toy):
    model = toy(activation="gelu")
    whole = attribution_patch(model, CLEAN, CORRUPT, metric).node_scores
    each = [
        attribution_patch(model, CLEAN[i : i + 1], CORRUPT[i : i + 1], metric).node_scores for i in (0, 1)
    ]
    assert whole == {node: pytest.approx((each[0][node] + each[1][node]) / 2) for node in whole}
    assert any(abs(score) > 1e-3 for score in whole.values())


def test_attribution_of_a_model_without_mlps_is_refused_by_name(toy):
    with pytest.raises(ValueError, match="hook_mlp_out"):
        attribution_patch(toy(attn_only=True), CLEAN, CORRUPT, metric)


def test_a_model_in_training_mode_is_refused(toy):
    model = toy().train()
    with pytest.raises(ValueError, match="eval"):
        attribution_patch(model, CLEAN, CORRUPT, metric)
