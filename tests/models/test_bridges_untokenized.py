"""Bridges to models made of configs: no tokenizer, no network; key and value heads that queries share."""

import copy

import pytest
import torch

import dynamics as dy
from dynamics import measures
from dynamics.sites import Site
from tests.zoo.hugging_face import gpt2, llama, neox
from tests.zoo.small_models import tokens


@pytest.mark.parametrize("build", [gpt2, neox, llama])
def test_a_bridge_without_a_tokenizer_gives_what_the_model_gives_and_leaves_it_alone(build):
    model = build().eval()
    before = copy.deepcopy(model.state_dict())
    bridge = dy.bridge(model)
    batch = tokens(0)
    torch.testing.assert_close(
        bridge(batch.tokens), model(batch.tokens).logits, rtol=1e-4, atol=1e-6
    )  # NeoX's softmax is single
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {id(p) for p in bridge.parameters()}.isdisjoint({id(p) for p in model.parameters()})


@pytest.mark.parametrize("part", ["k", "v"])
def test_a_shared_key_or_value_head_is_exchanged_as_in_the_forward_by_hand(part):
    model = llama().eval()
    layer, head, d_head, n_kv = 1, 1, 4, 2
    contrasts = [dy.Contrast(tokens(i), tokens(i + 10), tokens(i)) for i in range(2)]
    inside, outside = f"blocks.{layer}.attn.hook_{part}", f"model.layers.{layer}.self_attn.{part}_proj"
    own = slice(head * d_head, (head + 1) * d_head)
    everywhere = (slice(None), slice(None))
    by_bridge, by_module = (
        dy.patch_activations(
            dy.Recipe(one), None, contrasts, [Site("a head", {name: index})], measures.correct_logit
        )
        for one, name, index in (
            (dy.bridge(model), inside, (*everywhere, head)),
            (model, outside, (*everywhere, own)),
        )
    )
    module = model.get_submodule(outside)
    for i, contrast in enumerate(contrasts):
        kept = []
        with torch.no_grad():
            handle = module.register_forward_hook(lambda *given, kept=kept: kept.append(given[2].clone()))
            model(contrast.source.tokens)
            handle.remove()

            def exchanged(_, inputs, output, kept=kept):
                output = output.clone().unflatten(-1, (n_kv, d_head))
                output[:, :, head] = kept[0].unflatten(-1, (n_kv, d_head))[:, :, head]
                return output.flatten(-2)

            handle = module.register_forward_hook(exchanged)
            expected = float(measures.correct_logit(model, contrast.probe).mean())
            handle.remove()
            assert abs(float(measures.correct_logit(model, contrast.probe).mean()) - expected) > 1e-6
        for found in (by_bridge, by_module):
            assert float(found["patched"].isel(example=i).item()) == pytest.approx(expected, rel=1e-9)
