"""Sites in activations: hooks, layers, heads and positions."""

import itertools

import pytest
import torch
from torch import nn

from dynamics import sites
from dynamics.sites import SiteError
from tests.zoo.cases import first_quick
from tests.zoo.hugging_face import gpt2
from tests.zoo.output_models import ALL, MODELS, every_model, every_toy, shapes
from tests.zoo.signal_models import TOYS, Lstm, made
from tests.zoo.small_models import (
    tokens,
    transformer,
)


@every_model
def test_hooks_are_the_submodules_that_are_no_mere_lists_in_the_models_order(name):
    model = MODELS[name]()
    expected = [n for n, m in model.named_modules() if n and type(m) is not nn.ModuleList]
    assert sites.hooks(model) == expected
    assert len(expected) == len(set(expected)) >= 3


@every_toy
def test_every_hook_of_transformerlens_is_among_them_and_can_be_asked_for_by_a_glob(name):
    model = MODELS[name]()
    assert set(model.hook_dict) <= set(sites.hooks(model))
    residual = sites.hooks(model, "blocks.*.hook_resid_*")
    places = ("pre", "post") if model.config.attn_only else ("mid", "pre", "post")
    assert sorted(residual) == sorted(f"blocks.{i}.hook_resid_{p}" for i in range(2) for p in places)
    assert sites.hooks(model, "blocks.1.attn.hook_?") == [f"blocks.1.attn.hook_{p}" for p in "qkvz"]


def test_containers_that_are_called_are_hooks_and_those_that_are_not_are_none():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.listed = nn.ModuleList([nn.Linear(2, 2)])
            self.named = nn.ModuleDict({"one": nn.Linear(2, 2)})
            self.weights = nn.ParameterList([nn.Parameter(torch.ones(2))])
            self.more = nn.ParameterDict({"two": nn.Parameter(torch.ones(2))})
            self.chained = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    assert sites.hooks(Kept()) == ["listed.0", "named.one", "chained", "chained.0", "chained.1"]


def test_a_module_used_twice_is_one_hook():
    shared = nn.Linear(2, 2)
    assert sites.hooks(nn.Sequential(shared, nn.ReLU(), shared)) == ["0", "1"]


@pytest.mark.parametrize("call", [sites.hooks, sites.activations])
@pytest.mark.parametrize("pattern", ["blocks", "*.hook_nothing", "", "BLOCKS.0"])
def test_a_glob_that_matches_nothing_is_refused_and_what_there_is_is_listed(call, pattern):
    with pytest.raises(SiteError) as error:
        call(transformer(), pattern)
    assert f"no submodule matches {pattern!r}. ToyTransformer has embed, pos_embed, blocks.0, " in str(
        error.value
    )
    assert " more." in str(error.value)


@every_model
def test_by_layer_every_submodule_is_a_site_of_its_own_under_a_label_of_its_own(name):
    model = MODELS[name]()
    pattern = "*blocks*" if name in TOYS else "*"
    found = sites.activations(model, pattern)
    assert [list(s.covers) for s in found] == [[n] for n in sites.hooks(model, pattern)]
    assert len({s.label for s in found}) == len(found)
    assert all(index is ... for s in found for index in s.covers.values())
    assert {s.coords["level"] for s in found} == {"activations"}
    assert all(s.coords["head"] == -1 and "pos" not in s.coords for s in found)
    sites.check_outputs(found, model)


@pytest.mark.parametrize(
    ("model", "name", "label", "layer", "component"),
    [
        ("LN gelu", "blocks.1.hook_resid_pre", "resid_pre 1", 1, "resid_pre"),
        ("LN gelu", "blocks.0.attn.hook_z", "attn.z 0", 0, "attn.z"),
        ("LN gelu", "blocks.0.attn", "attn 0", 0, "attn"),
        ("LN gelu", "blocks.1.ln2.hook_scale", "ln2.scale 1", 1, "ln2.scale"),
        ("LN gelu", "blocks.1", "blocks 1", 1, "blocks"),
        ("LN gelu", "hook_embed", "embed", -1, "embed"),
        ("LN gelu", "ln_final.hook_normalized", "ln_final.normalized", -1, "ln_final.normalized"),
        ("GPT-2", "transformer.h.1.mlp", "mlp 1", 1, "mlp"),
        ("GPT-2", "transformer.h.0.mlp.c_fc", "mlp.c_fc 0", 0, "mlp.c_fc"),
        ("GPT-2", "transformer.wte", "transformer.wte", -1, "transformer.wte"),
        ("classifier", "encoder", "encoder", -1, "encoder"),
    ],
)
def test_a_label_and_its_coordinates_say_where_an_output_stands(model, name, label, layer, component):
    (found,) = sites.activations(MODELS[model](), name)
    assert found.label == label
    assert found.coords == {"level": "activations", "component": component, "layer": layer, "head": -1}
    assert found.covers == {name: ...}
    assert found.positions is None


def test_a_hook_and_the_module_it_stands_in_are_told_apart():
    with pytest.raises(SiteError, match="embed occur more than once"):
        sites.check_outputs(
            [s for n in ("hook_embed", "embed") for s in sites.activations(transformer(), n)], transformer()
        )


@every_toy
def test_without_layer_one_site_covers_a_component_of_all_layers(name):
    model = MODELS[name]()
    found = sites.activations(model, "blocks.*.hook_resid_*", by=())
    places = ("mid", "pre", "post") if not model.config.attn_only else ("pre", "post")
    assert sorted(s.label for s in found) == sorted(f"resid_{p}" for p in places)
    for site in found:
        assert list(site.covers) == [f"blocks.{i}.hook_{site.label}" for i in range(2)]
        assert site.coords["layer"] == -1


class TwoStacks(nn.Module):
    """An encoder and a decoder whose layers have the same names, as in nn.Transformer or T5."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (
            nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(3, 3)}) for _ in range(2))})
            for _ in range(2)
        )

    def forward(self, x):
        for stack in (self.encoder, self.decoder):
            for layer in stack["layers"]:
                x = layer["up"](x)
        return x


@pytest.mark.parametrize(("make", "pattern"), [(TwoStacks, "*.up"), (transformer, "*embed")])
def test_by_layer_each_module_is_a_site_of_its_own_also_where_two_are_called_alike(make, pattern):
    model = make()
    found = sites.activations(model, pattern)
    assert [list(s.covers) for s in found] == [[n] for n in sites.hooks(model, pattern)]


def test_modules_of_a_bare_sequence_have_labels_that_begin_with_a_word():
    found = sites.activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "*")
    assert all(s.coords["component"] for s in found)
    assert [s.label.strip() for s in found] == [s.label for s in found]


AXES = {
    **{f"blocks.*.attn.hook_{p}": (2, 1) for p in "qkvz"},
    "blocks.*.attn.hook_pattern": (1, 2),
    "blocks.*.attn.hook_attn_scores": (1, 2),
    "blocks.*.hook_resid_pre": (None, 1),
    "blocks.*.hook_attn_out": (None, 1),
    "blocks.*.attn": (None, 1),
    "hook_embed": (None, 1),
    "ln_final": (None, 1),
}
"""The axes of heads and positions, as the toy's forward has them."""

WAYS = [
    by
    for n in range(4)
    for by in itertools.combinations(("layer", "head", "pos"), n)
    if {"head", "pos"} & {*by}
]


def expected_index(by, axes, head, pos):
    """The index that a head and a position are, written out for each rank."""
    head_axis, pos_axis = axes
    if "head" in by and "pos" in by:
        return (ALL, pos, head) if head_axis == 2 else (ALL, head, pos)
    if "head" in by:
        return (ALL,) * head_axis + (head,)
    return (ALL,) * pos_axis + (pos,)


@pytest.mark.parametrize("by", WAYS, ids="-".join)
@pytest.mark.parametrize("pattern", AXES)
@pytest.mark.parametrize("name", first_quick(TOYS))
def test_each_head_and_position_is_a_site_and_together_they_are_the_activation(name, pattern, by):
    model, like = MODELS[name](), tokens(0)
    axes = AXES[pattern]
    if "head" in by and axes[0] is None:
        with pytest.raises(
            SiteError, match=r"no axis of heads that is known; TransformerLens's hooks q, k, v"
        ):
            sites.activations(model, pattern, by=by, like=like)
        return
    found = sites.activations(model, pattern, by=by, like=like)
    names = sites.hooks(model, pattern)
    layered = "layer" in by and names[0].startswith("blocks")
    heads = range(2) if "head" in by else [-1]
    places = range(4) if "pos" in by else [-1]
    assert len(found) == (len(names) if layered else 1) * len(heads) * len(places)
    assert len({s.label for s in found}) == len(found)
    sites.check_outputs(found, model)
    for site in found:
        head, pos = site.coords["head"], site.coords.get("pos", -1)
        assert ("pos" in site.coords) == ("pos" in by)
        covered = [n for n in names if not layered or f"blocks.{site.coords['layer']}." in n]
        assert site.covers == {n: expected_index(by, axes, head, pos) for n in covered}
    assert {(s.coords["layer"], s.coords["head"], s.coords.get("pos", -1)) for s in found} == set(
        itertools.product(range(2) if layered else [-1], heads, places)
    )
    for submodule, shape in shapes(model, like.tokens).items():
        if submodule in names:
            count = torch.zeros(shape)
            for site in (s for s in found if submodule in s.covers):
                count[site.covers[submodule]] += 1
            assert (count == 1).all()


@pytest.mark.parametrize(
    ("by", "label"),
    [
        (("layer", "head"), "attn.z L1H0"),
        (("layer", "pos"), "attn.z 1 @2"),
        (("head",), "attn.z H0"),
        (("pos",), "attn.z @2"),
        (("head", "pos"), "attn.z H0 @2"),
        (("pos", "head", "layer"), "attn.z L1H0 @2"),
    ],
)
def test_labels_say_layer_head_and_position_whatever_the_order_of_by(by, label):
    model = transformer()
    found = [s.label for s in sites.activations(model, "blocks.*.attn.hook_z", by=by, like=tokens(0))]
    assert label in found
    assert found == [
        s.label for s in sites.activations(model, "blocks.*.attn.hook_z", by=by[::-1], like=tokens(0))
    ]


def test_the_numbers_of_heads_and_positions_are_those_of_the_model_and_of_the_call():
    model = transformer(n_heads=3)
    found = sites.activations(model, "blocks.*.attn.hook_z", by=("head", "pos"), like=tokens(0).tokens[:, :3])
    assert [(s.coords["head"], s.coords["pos"]) for s in found] == list(itertools.product(range(3), range(3)))


def test_positions_of_hugging_faces_outputs_are_found_in_the_first_tensor_of_a_tuple():
    model = gpt2()
    found = sites.activations(model, "transformer.h.*.attn", by=("layer", "pos"), like=tokens(0))
    assert [s.label for s in found] == [f"attn {layer} @{pos}" for layer in range(2) for pos in range(4)]
    assert found[5].covers == {"transformer.h.1.attn": (ALL, 1)}
    with pytest.raises(SiteError, match=r"'transformer\.h\.0\.attn' has no axis of heads"):
        sites.activations(model, "transformer.h.*.attn", by=("head",), like=tokens(0))


def test_positions_of_a_recurrent_layer_are_those_of_its_states():
    found = sites.activations(made(Lstm), "lstm", by=("pos",), like=tokens(0))
    assert [(s.label, s.covers["lstm"]) for s in found] == [(f"lstm @{i}", (ALL, i)) for i in range(4)]


class Query(nn.Module):
    """Its layer `q` gives [batch, pos, d_model], as T5's does: six features, no heads."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 6)

    def forward(self, x):
        return self.q(x)


def test_a_users_layer_called_q_has_no_heads_that_are_known():
    with pytest.raises(SiteError, match="no axis of heads that is known"):
        sites.activations(Query(), "q", by=("head",), like=torch.randn(2, 5, 4))
