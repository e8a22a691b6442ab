"""Sites of outputs, positions, neurons and rows; unions and complements: what they cover, the model unharmed."""

import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from engine_models import (
    D_VOCAB,
    Tied,
    classifier,
    classifier_recipe,
    outcomes,
    points,
    same,
    tied,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)
from hugging_face import gpt2, times_covered
from signal_models import TOYS, ConvNet, Lstm, images, made
from torch import Tensor, nn

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site, SiteError

ALL = slice(None)

MODELS = {
    **{name: lambda changes=changes: transformer(**changes) for name, changes in TOYS.items()},
    "classifier": lambda: classifier(norm=True, dropout=0.3),
    "convolutions": lambda: made(ConvNet),
    "LSTM": lambda: made(Lstm),
    "GPT-2": gpt2,
}

LANGUAGE = {*TOYS, "LSTM", "GPT-2"}
every_model = pytest.mark.parametrize("name", MODELS)
every_toy = pytest.mark.parametrize("name", TOYS)


def given_to(name):
    """What each model is called with: a tensor."""
    if name in LANGUAGE:
        return tokens(0).tokens
    return images(0)[0] if name == "convolutions" else points(0)[0]


def shapes(model, like):
    """Shape of the first floating-point tensor that each submodule gives, read with hooks of our own."""
    found = {}

    def keep(name, output):
        given = (
            [output] if isinstance(output, Tensor) else [t for t in leaves(output) if t.is_floating_point()]
        )
        found.setdefault(name, given[0].shape)

    handles = [
        module.register_forward_hook(lambda _, __, out, n=name: keep(n, out))
        for name, module in model.named_modules()
    ]
    model.eval()(like)
    for handle in handles:
        handle.remove()
    return found


def leaves(output):
    if isinstance(output, Tensor):
        return [output]
    parts = (
        output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else []
    )
    return [leaf for part in parts for leaf in leaves(part)]


def described(found):
    """Labels, coordinates and covers as plain data."""
    return [(s.label, dict(s.coords), {n: str(index) for n, index in s.covers.items()}) for s in found]


# --- hooks ------------------------------------------------------------------------------------------------


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


# --- activations: layers ----------------------------------------------------------------------------------


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


# --- activations: heads and positions ---------------------------------------------------------------------

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
@every_toy
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


# --- what the model is called with ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LN gelu", "LSTM", "GPT-2", "classifier"])
def test_a_tensor_a_tuple_a_dict_and_a_batch_teach_the_same_shapes(name):
    model, like = MODELS[name](), given_to(name)
    if name == "classifier":
        like = like[:, None].expand(-1, 8, -1)  # [rows, 8, 5]: its batch normalisation takes axis 1
    pattern = {"LN gelu": "blocks.*.hook_resid_mid", "LSTM": "embed", "classifier": "drop"}.get(name, "*.mlp")
    word = {"GPT-2": "input_ids", "classifier": "x"}.get(name, "tokens")
    ways = [like, (like,), {word: like}, *([tokens(0)] if name in LANGUAGE else [])]
    first, *others = (
        described(sites.activations(model, pattern, by=("layer", "pos"), like=way)) for way in ways
    )
    assert len(first) in (4, 8)
    assert all(other == first for other in others)


@pytest.mark.parametrize("by", [("head",), ("pos",), ("layer", "head", "pos")])
def test_heads_and_positions_need_to_know_what_the_model_is_called_with(by):
    with pytest.raises(SiteError, match=r"cutting by head or pos needs like=: a Batch, or what the model"):
        sites.activations(transformer(), "blocks.*.attn.hook_z", by=by)


def test_layers_need_no_call():
    model = transformer()
    model.forward = None
    assert len(sites.activations(model, "blocks.*.hook_resid_pre", like="nothing")) == 2


@pytest.mark.parametrize(
    ("like", "kind"),
    [
        (torch.zeros(2, 9, dtype=torch.int64), "Tensor"),
        (torch.zeros(2, 4), "Tensor"),
        (torch.full((2, 4), D_VOCAB), "Tensor"),
        ((tokens(0).tokens, 3), "tuple"),
        ({"words": tokens(0).tokens}, "dict"),
        (tokens(0).tokens.tolist(), "list"),
        ("tokens", "str"),
    ],
)
def test_what_the_model_cannot_be_called_with_is_refused_with_the_models_own_words(like, kind):
    with pytest.raises(
        SiteError, match=rf"ToyTransformer cannot be called with like={kind}: .+\. Give a Batch"
    ) as e:
        sites.activations(transformer(), "blocks.*.hook_resid_pre", by=("pos",), like=like)
    assert e.value.__cause__ is not None


@pytest.mark.parametrize("by", ["heads", "layers", "position", "batch"])
def test_another_axis_is_refused_by_name(by):
    with pytest.raises(SiteError, match=rf"by=\['{by}'\]: an activation can be cut by layer, head, pos, src"):
        sites.activations(transformer(), "blocks.*.hook_resid_pre", by=("layer", by), like=tokens(0))


def test_an_output_without_positions_is_refused_with_its_shape():
    with pytest.raises(SiteError, match=r"the output of 'encoder' has shape \(7, 8\), and no axis 1 for pos"):
        sites.activations(classifier(), "encoder", by=("pos",), like=points(0)[0])


def test_an_output_that_has_no_axis_for_heads_is_refused_with_its_shape():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.hook_z = nn.Identity()

        def forward(self, x):
            return self.hook_z(x)

    with pytest.raises(SiteError, match=r"the output of 'hook_z' has shape \(2, 3\), and no axis 2 for head"):
        sites.activations(Flat(), "hook_z", by=("head",), like=torch.zeros(2, 3))


class Partly(nn.Module):
    """One layer that never runs, and one that gives whole numbers alone."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(3, 3)
        self.counted = nn.Identity()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        self.counted(torch.zeros(2, 3, 4, dtype=torch.int64))
        return self.layer(x)


@pytest.mark.parametrize("name", ["idle", "counted"])
def test_a_module_that_gives_no_floating_point_tensor_is_refused_by_name(name):
    with pytest.raises(SiteError, match=rf"'{name}' gave no floating-point tensor when the model was called"):
        sites.activations(Partly(), name, by=("pos",), like=torch.zeros(2, 4, 3))
    assert len(sites.activations(Partly(), "layer", by=("pos",), like=torch.zeros(2, 4, 3))) == 4


def test_outputs_of_parameters_twice_named_or_of_nothing_are_refused():
    model = transformer()
    (site,) = sites.activations(model, "hook_embed")
    with pytest.raises(SiteError, match="embed occur more than once"):
        sites.check_outputs([site, site], model)
    with pytest.raises(SiteError, match="covers nothing"):
        sites.check_outputs([Site("none", {})], model)
    with pytest.raises(SiteError, match=r"'list' covers 'blocks', which is no submodule with an output"):
        sites.check_outputs([Site("list", {"blocks": ...})], model)


# --- the model is left as it was --------------------------------------------------------------------------


class Told(nn.Module):
    """A layer that keeps count of its calls in buffers: one written in place, one assigned anew."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))

    def forward(self, x):
        self.written += 1
        self.assigned = self.assigned + 1
        return self.linear(x)


class Belonging(nn.Module):
    """Batch normalisation, dropout and counting buffers: [batch, pos, 5] -> [batch, pos, 3]."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.told = Told()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.told(self.drop(self.norm(self.encoder(x)))))


def belonging():
    """In an unusual state: submodules in modes of their own, a frozen parameter, a gradient, hooks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Belonging()
    model.train()
    model.head.eval()
    model.encoder.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.drop.register_forward_hook(lambda *_: None)
    model.encoder.register_full_backward_hook(lambda *_: None)
    return model


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model):
    """All of a model, and of the generators, that a call might change."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return {
        "tensors": {n: (id(t), t.requires_grad, t.detach().numpy().tobytes()) for n, t in tensors.items()},
        "gradients": {n: None if t.grad is None else t.grad.numpy().tobytes() for n, t in tensors.items()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: [list(getattr(m, h)) for h in HOOKS] for n, m in model.named_modules()},
        "generators": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        "gradients are taken": torch.is_grad_enabled(),
    }


X = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))

CALLS = {
    "by layer": lambda m: sites.activations(m, "*"),
    "by position": lambda m: sites.activations(m, "*", by=("layer", "pos"), like=X),
    "by position, a dict": lambda m: sites.activations(m, "*", by=("layer", "pos"), like={"x": X}),
    "hooks": sites.hooks,
    "rows": lambda m: sites.rows(m, "encoder.weight"),
    "union": lambda m: sites.union(m, sites.parameters(m)),
    "complement": lambda m: sites.complement(m, sites.rows(m, "encoder.weight")[0]),
    "positions": lambda m: sites.at_positions(sites.parameters(m), {"first": 0}),
}
FAILING = {
    "a shape it does not take": lambda m: sites.activations(m, "*", by=("pos",), like=torch.zeros(6, 4, 7)),
    "half way through": lambda m: sites.activations(m, "*", by=("pos",), like=torch.zeros(6, 9, 5)),
    "no such word": lambda m: sites.activations(m, "*", by=("pos",), like={"y": X}),
    "nothing at all": lambda m: sites.activations(m, "*", by=("pos",)),
    "no heads": lambda m: sites.activations(m, "*", by=("head",), like=X),
    "no such module": lambda m: sites.activations(m, "nothing", by=("pos",), like=X),
    "no such parameter": lambda m: sites.rows(m, "nothing"),
    "no neurons": sites.neurons,
    "not of this model": lambda m: sites.complement(m, Site("far", {"encoder.weight": (8,)})),
}


@pytest.mark.parametrize("call", CALLS)
def test_making_sites_leaves_the_model_and_the_generators_as_they_were(call):
    model = belonging()
    before = state(model)
    assert CALLS[call](model)
    assert state(model) == before


@pytest.mark.parametrize("call", FAILING)
def test_failing_to_make_sites_leaves_the_model_and_the_generators_as_they_were(call):
    model = belonging()
    before = state(model)
    with pytest.raises(SiteError):
        FAILING[call](model)
    assert state(model) == before


@pytest.mark.parametrize("name", [*TOYS, "GPT-2"])
def test_transformers_are_left_as_they_were(name):
    model = MODELS[name]().train()
    before = state(model)
    sites.activations(model, "*.attn", by=("layer", "pos"), like=tokens(0))
    assert state(model) == before


def test_a_call_that_is_interrupted_leaves_no_hook_behind():
    model = belonging()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.told.register_forward_hook(interrupt)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        CALLS["by position"](model)
    assert state(model) == before
    handle.remove()


class Noisy(nn.Module):
    """Noise in every mode: a diffusion model, or dropout at inference."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(x + torch.randn(x.shape))


def test_a_model_that_draws_in_eval_mode_moves_no_generator_of_the_users():
    model = Noisy()
    before = state(model)
    sites.activations(model, "layer", by=("pos",), like=X)
    assert state(model) == before


def test_a_model_whose_parameters_have_no_shape_yet_is_refused_and_keeps_no_hook():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once in a process that lazy modules are new
        model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises((SiteError, ValueError)):
        sites.activations(model, "0", by=("pos",), like=X)
    assert not [hook for hook in model[0]._forward_hooks.values() if "_shapes" in repr(hook)]


# --- positions --------------------------------------------------------------------------------------------


def test_every_site_stands_once_at_every_position_with_all_else_its_own():
    given = sites.components(transformer())[:3]
    found = sites.at_positions(given, {"tag": 0, "rest": [1, 2], "last": -1, "range": range(1, 3)})
    assert [s.label for s in found] == [
        f"{s.label} @ {name}" for s in given for name in ("tag", "rest", "last", "range")
    ]
    for i, site in enumerate(found):
        own = given[i // 4]
        assert site.positions == ((0,), (1, 2), (-1,), (1, 2))[i % 4]
        assert site.covers == own.covers
        assert site.coords == {**own.coords, "position": ("tag", "rest", "last", "range")[i % 4]}
    assert all(s.positions is None and "position" not in s.coords for s in given)
    sites.check(found, transformer())


def test_no_sites_or_no_positions_are_no_sites():
    assert sites.at_positions([], {"tag": 0}) == []
    assert sites.at_positions(sites.components(transformer()), {}) == []


@pytest.mark.parametrize("where", [np.int64(2), torch.tensor(2), [np.int64(2)], np.array([2])])
def test_a_position_may_be_any_kind_of_whole_number(where):
    (found,) = sites.at_positions(sites.components(transformer())[:1], {"integer": where})
    assert found.positions == (2,)
    assert type(found.positions[0]) is int


# --- neurons ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in TOYS if n != "attention only"])
def test_neurons_cover_all_of_an_mlp_but_its_output_bias_exactly_once(name):
    model = MODELS[name]()
    found = sites.neurons(model)
    assert [s.label for s in found] == [f"L{layer}N{i}" for layer in range(2) for i in range(12)]
    for site in found:
        layer, i = site.coords["layer"], site.coords["neuron"]
        assert site.label == f"L{layer}N{i}"
        assert site.coords == {
            "level": "neurons",
            "component": "neuron",
            "layer": layer,
            "head": -1,
            "neuron": i,
        }
    for parameter, count in times_covered(model, found).items():
        inside = ".mlp." in parameter and not parameter.endswith("b_out")
        assert (count == inside).all()
    sites.check(found, model)


def test_a_neuron_is_what_its_own_activation_is_made_of_and_what_it_writes():
    model, batch = transformer(), tokens(0)
    found = sites.neurons(model)[12 + 5]
    _, before = model.run_with_cache(batch.tokens)
    with torch.no_grad():
        for name, index in found.covers.items():
            model.get_parameter(name)[index] += 1.0
    _, after = model.run_with_cache(batch.tokens)
    hook = "blocks.1.mlp.hook_pre"
    differing = (before[hook] != after[hook]).flatten(0, 1).any(0)
    assert differing.nonzero().flatten().tolist() == [5]
    silent = transformer()
    with torch.no_grad():
        for name, index in found.covers.items():
            silent.get_parameter(name)[index] = 0.0
    lost = silent.run_with_cache(batch.tokens)[1]["blocks.1.hook_mlp_out"]
    mlp, post = transformer().blocks[1].mlp, before["blocks.1.mlp.hook_post"]
    torch.testing.assert_close(before["blocks.1.hook_mlp_out"] - lost, post[..., 5:6] * mlp.W_out[5].detach())


def test_a_gated_neuron_has_its_gate():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            mlp = nn.Module()
            for name, shape in {"W_in": (3, 4), "W_gate": (3, 4), "b_in": (4,), "b_gate": (4,)}.items():
                mlp.register_parameter(name, nn.Parameter(torch.zeros(shape)))
            mlp.W_out, mlp.b_out = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3))
            block = nn.Module()
            block.mlp = mlp
            self.blocks = nn.ModuleList([block])

    model = Gated()
    found = sites.neurons(model)
    assert len(found) == 4
    start = "blocks.0.mlp."
    assert found[2].covers == {
        f"{start}W_in": (ALL, 2),
        f"{start}W_gate": (ALL, 2),
        f"{start}b_in": (2,),
        f"{start}b_gate": (2,),
        f"{start}W_out": (2,),
    }
    assert {n: int(c.max()) for n, c in times_covered(model, found).items()} == {
        n: int(not n.endswith("b_out")) for n, _ in model.named_parameters()
    }


@pytest.mark.parametrize("name", ["attention only", "classifier", "GPT-2"])
def test_models_without_such_an_mlp_are_told_what_to_use(name):
    model = MODELS[name]()
    with pytest.raises(
        SiteError, match=r"no parameters named blocks\.0\.mlp\.W_in .* Use sites\.rows\(model, name\)"
    ):
        sites.neurons(model)


# --- rows -------------------------------------------------------------------------------------------------


@every_model
def test_rows_of_every_parameter_with_axes_are_a_partition_of_it(name):
    model = MODELS[name]()
    for parameter, tensor in model.named_parameters():
        if tensor.ndim == 0:
            continue
        found = sites.rows(model, parameter)
        assert [s.label for s in found] == [f"{parameter} {i}" for i in range(len(tensor))]
        assert [s.coords["index"] for s in found] == list(range(len(tensor)))
        assert {(s.coords["level"], s.coords["component"]) for s in found} == {("rows", parameter)}
        numbers = [int(word) for word in parameter.split(".") if word.isdigit()]
        assert {s.coords["layer"] for s in found} == {*(numbers[:1] or [-1])}
        count = times_covered(model, found)
        assert (count.pop(parameter) == 1).all()
        assert not any(other.any() for other in count.values())
        sites.check(found, model)


def test_rows_of_what_is_not_there_or_has_no_axes_are_refused():
    model = classifier(norm=True)
    for name in ("temperature", "nothing", "norm.running_mean", "encoder"):
        with pytest.raises(
            SiteError, match=rf"Classifier has no parameter {name!r} with rows; it has temperature, "
        ):
            sites.rows(model, name)


def test_rows_of_a_tied_tensor_go_by_its_first_name():
    assert len(sites.rows(tied(), "embed.weight")) == D_VOCAB
    with pytest.raises(SiteError, match=r"no parameter 'unembed\.weight' with rows"):
        sites.rows(tied(), "unembed.weight")


def test_the_union_of_a_parameters_rows_is_patched_as_the_parameter_bitwise():
    recipe = transformer_recipe()
    live = trained(recipe, [tokens(0), tokens(1)])
    found = sites.rows(recipe.model, "embed.W_E")
    whole = Site("whole", {"embed.W_E": ...})
    pair = dy.Contrast(tokens(10), tokens(11), tokens(12))
    patched = [sites.union(recipe.model, found, "all rows"), whole, found[3]]
    after = outcomes(dy.patch_gradients, recipe, live.last, pair, patched)
    assert same(after["all rows"], after["whole"])
    assert not same(after["whole"], after["base"])
    moved = (after["embed.W_E 3"]["embed.W_E"] != after["base"]["embed.W_E"]).any(1)
    assert moved[3]


# --- unions and complements -------------------------------------------------------------------------------


def made_of(name):
    """Sites of every kind that a model has: whole tensors, slices, single integers, masks."""
    model = MODELS[name]()
    found = sites.parameters(model)
    if name in TOYS or name == "GPT-2":
        found += [s for level in ("components", "heads", "matrices") for s in sites.LEVELS[level](model)]
    if name in TOYS and name != "attention only":
        found += sites.neurons(model)[::5]
    first = next(n for n, p in model.named_parameters() if p.ndim > 1)
    shape = model.get_parameter(first).shape
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found += [*sites.rows(model, first)[:2], Site("a mask", {first: drawn})]
    found.append(Site("columns", {first: (ALL, torch.tensor([0, shape[1] - 1]))}))
    return model, {s.label: s for s in found}


def covered(model, *given):
    """Which elements of each parameter any of the sites covers."""
    return {name: count > 0 for name, count in times_covered(model, given).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_model
def test_a_union_covers_exactly_what_any_of_its_sites_covers(name):
    model, known = made_of(name)
    labels = list(known)
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5):
        for _ in range(12):
            chosen = [known[labels[i]] for i in rng.permutation(len(labels))[:n]]
            found = sites.union(model, chosen)
            sites.check([found], model)
            expected = covered(model, chosen[0])
            for site in chosen[1:]:
                expected = {p: expected[p] | mine for p, mine in covered(model, site).items()}
            assert equal(covered(model, found), expected)
            assert all(covered(model, found)[p].any() for p in found.covers)


@every_model
def test_a_complement_covers_exactly_the_rest_and_with_its_site_everything(name):
    model, known = made_of(name)
    for site in known.values():
        rest = sites.complement(model, site)
        mine, others = covered(model, site), covered(model, rest)
        assert all(torch.equal(others[p], ~mine[p]) for p in mine)
        assert set(rest.covers) == {p for p, other in others.items() if other.any()}
        assert rest.label == f"all but {site.label}"
        assert rest.coords == {
            "level": "complement", "component": f"all but {site.label}", "layer": -1, "head": -1,
        }  # fmt: skip
        both = sites.union(model, [site, rest])
        assert all(whole.all() for whole in covered(model, both).values())
        assert len(both.covers) == len(mine)


@every_model
def test_the_complement_of_a_complement_is_the_site(name):
    model, known = made_of(name)
    for site in list(known.values())[::3]:
        twice = sites.complement(model, sites.complement(model, site))
        assert equal(covered(model, twice), covered(model, site))


def test_a_tensor_covered_whole_by_slices_or_by_a_mask_is_not_in_the_complement():
    model = classifier()
    for index in ((ALL,), (slice(0, 8), ALL), torch.ones(8, 5, dtype=torch.bool), (torch.arange(8),)):
        rest = sites.complement(model, Site("whole", {"encoder.weight": index}))
        assert set(rest.covers) == {n for n, _ in model.named_parameters()} - {"encoder.weight"}


def test_buffers_are_in_a_union_and_never_in_a_complement():
    model = classifier(norm=True)
    mean = Site("mean", {"norm.running_mean": (slice(0, 3),)})
    more = Site("more", {"norm.running_mean": (slice(2, 5),)})
    both = sites.union(model, [mean, more]).covers["norm.running_mean"]
    assert both.tolist() == [True] * 5 + [False] * 3
    rest = sites.complement(model, mean)
    assert set(rest.covers) == {n for n, _ in model.named_parameters()}


def test_nothing_is_left_of_everything_and_no_verb_takes_it():
    model = classifier()
    rest = sites.complement(model, sites.everything(model))
    assert rest.covers == {}
    with pytest.raises(SiteError, match="'all but everything' covers nothing"):
        sites.check([rest], model)
    with pytest.raises(SiteError, match="covers nothing"):
        sites.complement(model, rest)


def test_the_complement_of_what_is_not_there_is_refused():
    with pytest.raises(SiteError, match=r"covers 'nothing', but the model has"):
        sites.complement(classifier(), Site("none", {"nothing": ...}))
    with pytest.raises(SiteError, match=r"covers 'unembed\.weight', but the model has embed\.weight"):
        sites.complement(tied(), Site("second name", {"unembed.weight": ...}))
    assert isinstance(tied(), Tied)


def test_a_complements_masks_are_its_own():
    mask = torch.eye(8, 5, dtype=torch.bool)
    site = Site("diagonal", {"encoder.weight": mask})
    sites.complement(classifier(), site).covers["encoder.weight"].fill_(False)
    assert torch.equal(site.covers["encoder.weight"], torch.eye(8, 5, dtype=torch.bool))


def test_the_complement_of_a_site_with_positions_is_refused_or_keeps_them():
    model = classifier()
    (located,) = sites.at_positions([Site("head", {"head.weight": ...})], {"first": 0})
    try:
        rest = sites.complement(model, located)
    except SiteError:
        return
    assert rest.positions == located.positions


@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])
@pytest.mark.parametrize("kind", ["transformer", "classifier"])
def test_a_site_and_its_complement_together_are_the_source_step_and_apart_they_are_not(verb, kind):
    recipe = transformer_recipe() if kind == "transformer" else classifier_recipe()
    draw = tokens if kind == "transformer" else points
    live = trained(recipe, [draw(0), draw(1)])
    model = recipe.model
    site = sites.heads(model)[1] if kind == "transformer" else Site("columns", {"encoder.weight": (ALL, 2)})
    rest = sites.complement(model, site)
    both = sites.union(model, [site, rest], "both")
    pair = dy.Contrast(draw(10), draw(11), draw(12))
    after = outcomes(verb, recipe, live.last, pair, [site, rest, both])
    assert same(after["both"], after["source"])
    for label in (site.label, rest.label):
        assert not same(after[label], after["source"])
        assert not same(after[label], after["base"])
    if verb is dy.patch_updates:
        inside = covered(model, site)
        for name, here in inside.items():
            assert torch.equal(
                after[site.label][name], torch.where(here, after["source"][name], after["base"][name])
            )
            assert torch.equal(
                after[rest.label][name], torch.where(here, after["base"][name], after["source"][name])
            )
