"""The toy transformer as a module: names, weights, randomness, dtypes, copies and torch.func."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from dynamics.models.toy import ToyTransformer

SHAPES = {
    "embed.W_E": (6, 4),
    "pos_embed.W_pos": (4, 4),
    "blocks.{}.ln1.w": (4,),
    "blocks.{}.ln1.b": (4,),
    "blocks.{}.attn.W_Q": (2, 4, 3),
    "blocks.{}.attn.W_K": (2, 4, 3),
    "blocks.{}.attn.W_V": (2, 4, 3),
    "blocks.{}.attn.W_O": (2, 3, 4),
    "blocks.{}.attn.b_Q": (2, 3),
    "blocks.{}.attn.b_K": (2, 3),
    "blocks.{}.attn.b_V": (2, 3),
    "blocks.{}.attn.b_O": (4,),
    "blocks.{}.ln2.w": (4,),
    "blocks.{}.ln2.b": (4,),
    "blocks.{}.mlp.W_in": (4, 5),
    "blocks.{}.mlp.b_in": (5,),
    "blocks.{}.mlp.W_out": (5, 4),
    "blocks.{}.mlp.b_out": (4,),
    "ln_final.w": (4,),
    "ln_final.b": (4,),
    "unembed.W_U": (4, 6),
    "unembed.b_U": (6,),
}
"""Names and shapes in the state dict of an older HookedTransformer with one parameter per head axis."""


def hooked_transformer_shapes(normalization: str, attn_only: bool) -> dict[str, tuple[int, ...]]:
    shapes = {name.format(layer): shape for name, shape in SHAPES.items() for layer in (0, 1)}
    if normalization != "LN":
        shapes = {
            name: shape for name, shape in shapes.items() if not (".ln" in f".{name}" and name.endswith(".b"))
        }
    if normalization == "none":
        shapes = {name: shape for name, shape in shapes.items() if ".ln" not in f".{name}"}
    if attn_only:
        shapes = {
            name: shape for name, shape in shapes.items() if ".mlp." not in name and ".ln2." not in name
        }
    return shapes


def older_state_dict(model: ToyTransformer) -> dict[str, torch.Tensor]:
    """What a HookedTransformer run of the same shapes saved, its causal mask and IGNORE buffers included."""
    noise = torch.Generator().manual_seed(7)
    saved = {
        name: torch.randn(shape, generator=noise)
        for name, shape in hooked_transformer_shapes("LN", False).items()
    }
    for layer in range(2):
        saved[f"blocks.{layer}.attn.mask"] = torch.ones(9, 9, dtype=torch.bool)
        saved[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-torch.inf)
    return saved


@pytest.mark.parametrize("attn_only", [False, True])
@pytest.mark.parametrize("normalization", ["LN", "RMS", "none"])
def test_the_state_dict_has_exactly_hooked_transformers_names_and_shapes(toy, normalization, attn_only):
    state = toy(normalization=normalization, attn_only=attn_only).state_dict()
    expected = hooked_transformer_shapes(normalization, attn_only)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_every_entry_of_the_state_dict_is_trained(toy):
    model = toy()
    assert set(dict(model.named_parameters())) == set(model.state_dict())
    model(torch.tensor([[0, 1, 2, 3]])).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_older_state_dict_loads_strictly_once_its_mask_buffers_are_dropped(toy):
    model = toy(dtype="float32")
    saved = older_state_dict(model)
    weights = {name: tensor for name, tensor in saved.items() if not name.endswith((".mask", ".IGNORE"))}
    model.load_state_dict(weights, strict=True)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_an_older_mask_never_replaces_the_models_own(toy, tokens):
    model = toy(dtype="float32")
    left = model.load_state_dict(older_state_dict(model), strict=False)
    assert left.missing_keys == []
    assert torch.equal(model.blocks[0].attn.mask, torch.ones(4, 4).tril().bool())


def test_an_older_state_dict_loads_as_it_is(toy):
    model = toy(dtype="float32")
    model.load_state_dict(older_state_dict(model), strict=True)


def test_functional_call_uses_the_given_parameters_and_leaves_the_models_alone(toy, tokens):
    model, other = toy(), toy(seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        called = functional_call(model, dict(other.named_parameters()), (tokens,))
        assert torch.equal(called, other(tokens))
        assert not torch.equal(called, model(tokens))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("attn_only", [False, True])
@pytest.mark.parametrize("normalization", ["LN", "RMS", "none"])
def test_vmap_of_grad_equals_backward_row_by_row(toy, tokens, normalization, attn_only):
    model = toy(normalization=normalization, attn_only=attn_only, activation="gelu")
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(params, row):
        return functional_call(model, params, (row[None],))[0, -1].log_softmax(-1)[0]

    together = vmap(grad(loss), in_dims=(None, 0))(params, tokens)
    for i, row in enumerate(tokens):
        model.zero_grad()
        model(row[None])[0, -1].log_softmax(-1)[0].backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][i], parameter.grad, rtol=0, atol=1e-13)


def test_vmap_over_models_equals_each_model(toy, tokens):
    models = [toy(seed=seed) for seed in (0, 1, 2)]
    stacked = {
        name: torch.stack([dict(m.named_parameters())[name] for m in models])
        for name in models[0].state_dict()
    }
    with torch.no_grad():
        together = vmap(lambda params: functional_call(models[0], params, (tokens,)))(stacked)
        each = torch.stack([model(tokens) for model in models])
    torch.testing.assert_close(together, each, rtol=0, atol=1e-13)


def test_drawing_weights_leaves_every_global_generator_untouched(fresh_toy):
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    fresh_toy()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_weights_depend_on_the_seed_alone(fresh_toy):
    first = fresh_toy().state_dict()
    torch.manual_seed(99)
    again = fresh_toy().state_dict()
    other = fresh_toy(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if ".W_" in name]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)
    assert all(torch.equal(first[name], other[name]) for name in first if name not in drawn)


def test_a_weight_is_drawn_by_its_name_whatever_else_the_model_has(fresh_toy):
    deep = fresh_toy().state_dict()
    bare = fresh_toy(attn_only=True, n_layers=1).state_dict()
    drawn = [name for name in bare if ".W_" in name]
    assert len(drawn) == 7
    assert all(torch.equal(bare[name], deep[name]) for name in drawn)


def test_no_two_weights_of_one_shape_are_the_same_draw(fresh_toy):
    state = fresh_toy(d_head=4).state_dict()
    drawn = [tensor.flatten()[:8] for name, tensor in state.items() if ".W_" in name]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)


def test_weights_are_normal_with_variance_point_64_over_d_model_gains_one_and_biases_zero(fresh_toy):
    model = fresh_toy(300, n_layers=1, d_model=64, n_heads=4, d_head=32, d_mlp=200)
    for name, tensor in model.state_dict().items():
        if ".W_" not in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith(".w"))))
        elif tensor.numel() > 1000:
            assert tensor.mean().abs() < 5 * 0.1 / tensor.numel() ** 0.5
            assert abs(tensor.std() / 0.1 - 1) < 5 / (2 * tensor.numel()) ** 0.5


def test_an_open_seed_draws_like_seed_zero(fresh_toy):
    left_open, zero = (fresh_toy(seed=seed) for seed in (None, 0))
    assert torch.equal(left_open.embed.W_E, zero.embed.W_E)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_dtype_option_holds_for_parameters_logits_and_the_lens_config(toy, tokens, dtype):
    model = toy(dtype=dtype)
    expected = getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model(tokens).dtype == expected
    assert model.cfg.dtype == expected
    assert model.blocks[0].attn.mask.dtype == torch.bool


def test_moving_to_a_dtype_or_device_keeps_the_lens_config_in_step(toy):
    model = toy(dtype="float32")
    assert model.to(torch.float64) is model
    assert (model.cfg.dtype, model.cfg.device) == (torch.float64, "cpu")
    model.to("meta")
    assert (model.cfg.dtype, model.cfg.device) == (torch.float64, "meta")


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: nn.Sequential(m).to(torch.float64)])
def test_any_way_of_moving_the_parameters_keeps_the_lens_config_in_step(toy, move):
    model = toy(dtype="float32")
    move(model)
    assert model.cfg.dtype == next(model.parameters()).dtype == torch.float64


def test_a_deep_copy_computes_the_same_and_shares_nothing(toy, tokens):
    model = toy()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(tokens)
        assert torch.equal(twin(tokens), before)
        for parameter in twin.parameters():
            parameter.zero_()
        seen: list[str] = []
        twin.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda value, hook: seen.append(hook.name))])
        assert seen == ["hook_embed"]
        assert torch.equal(model(tokens), before)
