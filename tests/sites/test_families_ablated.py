"""The heads of every family, against one head ablated by hand in the forward pass."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.sites import SiteError
from tests.zoo.cases import first_quick
from tests.zoo.hugging_face import EVERY_FAMILY, OF_MORE_FAMILIES, llama, model_of, of_config, times_covered

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
TOKENS = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
UNKNOWN_TO_BRIDGES = {"neox without biases"}
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def output_projections(model):
    """The modules that read all heads side by side, by block."""
    return [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in OUTPUTS
        and "mlp" not in name
        and "attn" in name.replace("attention", "attn")
    ]


@contextmanager
def reading(module, change):
    """What the module reads is changed inside."""
    handle = module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def ablated(model, site):
    """A copy in which what the site covers is zero."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, index in site.covers.items():
            other.get_parameter(name)[index] = 0.0
    return other


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def of(model, component, layer):
    found = sites.matrices(model)
    return [s for s in found if (s.coords["component"], s.coords["layer"]) == (component, layer)]


@pytest.fixture
def model(request):
    return copy.deepcopy(model_of(request.param)).eval()


@pytest.mark.parametrize("model", first_quick(EVERY_FAMILY, 9), indirect=True)
def test_the_output_slice_of_a_head_is_what_reads_that_head(model):
    projections = output_projections(model)
    assert len(projections) == 2
    n_heads = len(of(model, "W_O", 0))
    for layer, head in ((0, 0), (1, n_heads - 1)):

        def without(z, head=head):
            heads = z.unflatten(-1, (n_heads, -1)).clone()
            heads[..., head, :] = 0.0
            return heads.flatten(-2)

        with reading(projections[layer], without):
            expected = logits(model)
        found = logits(ablated(model, of(model, "W_O", layer)[head]))
        torch.testing.assert_close(found, expected, **CLOSE)
        assert not torch.allclose(found, logits(model), **CLOSE)


@pytest.mark.parametrize("model", first_quick(EVERY_FAMILY, 9), indirect=True)
def test_queries_keys_and_values_of_a_head_move_what_it_reads_alone_or_its_group(model):
    n_heads, seen = len(of(model, "W_O", 0)), {}

    def keep(z):
        seen["z"] = z.detach().unflatten(-1, (n_heads, -1))
        return z

    def read(one):
        with reading(output_projections(one)[0], keep):
            logits(one)
        return seen["z"]

    plain = read(model)
    mixing = model.config.model_type == "olmo2"  # normalises the queries, and the keys, of all heads at once
    for part in "V" if mixing else "QKV":
        of_heads = of(model, f"W_{part}", 0)
        shared = n_heads // len(of_heads)
        for i, site in enumerate(of_heads):
            z = read(ablated(model, site))
            group = range(i * shared, (i + 1) * shared)
            moved = [h for h in range(n_heads) if not torch.allclose(z[..., h, :], plain[..., h, :], **CLOSE)]
            assert moved == list(group), site.label
            assert part != "V" or not z[..., moved, :].any()


@pytest.mark.parametrize(
    "model", first_quick(sorted(set(EVERY_FAMILY) - UNKNOWN_TO_BRIDGES), 3), indirect=True
)
def test_the_matrices_of_every_head_are_those_that_transformer_lens_finds_there(model):
    attention, own = dy.bridge(model).blocks[1].attn, dict(model.named_parameters())
    for part in "QKVO":
        expected = getattr(attention, f"W_{part}")
        slices = {s.coords["head"]: s.covers for s in of(model, f"W_{part}", 1)}
        assert sorted(slices) == list(range(len(expected)))
        for head, covers in slices.items():
            ((name, index),) = [(n, i) for n, i in covers.items() if n.endswith("weight")]
            found = own[name][index]
            assert torch.equal(found if found.shape == expected[head].shape else found.T, expected[head])


@pytest.mark.parametrize("level", ["matrices", "components", "parameters"])
@pytest.mark.parametrize("model", OF_MORE_FAMILIES, indirect=True)
def test_the_levels_of_every_family_are_partitions_with_the_usual_parts(model, level):
    parts = getattr(sites, level)(model)
    assert all((count == 1).all() for count in times_covered(model, parts).values())
    if level == "components":
        assert {"embed", "attn", "mlp", "ln"} <= {s.coords["component"] for s in parts}
    if level == "matrices":
        found = {s.coords["component"] for s in parts}
        assert {"W_E", "W_Q", "W_K", "W_V", "W_O", "W_out"} <= found
        assert found & {"ln1.w,b", "ln2.w,b"}
        assert sum("tied" not in s.label and s.label == next(iter(s.covers)) for s in parts) <= 8


def test_a_layout_that_no_table_has_is_refused():
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
    grouped = of_config("Falcon", **shape, new_decoder_architecture=True)
    with pytest.raises(SiteError, match=r"query_key_value\.weight of shape .*not where Bloom has them"):
        sites.heads(grouped)


def test_key_and_value_heads_that_do_not_divide_the_query_heads_are_named():
    model = llama(num_key_value_heads=4)
    model.config.num_attention_heads, model.config.head_dim = 2, 4
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.self_attn.o_proj = nn.Linear(16, 8, False), nn.Linear(8, 16, False)
    with pytest.raises(SiteError, match="2 query heads and 4 key and value heads"):
        sites.heads(model)
