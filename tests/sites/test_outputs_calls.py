"""Sites in activations are found by calling the model, which is left as it was."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from dynamics import sites
from dynamics.sites import Site, SiteError
from tests.zoo.output_models import LANGUAGE, MODELS, described, given_to
from tests.zoo.signal_models import TOYS
from tests.zoo.small_models import (
    D_VOCAB,
    classifier,
    points,
    tokens,
    transformer,
)


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
