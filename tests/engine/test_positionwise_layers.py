"""Layers that cannot act at some positions alone are refused; those that can are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dynamics as dy
from dynamics.engine.positionwise_layers import layers_of
from dynamics.patching import patch_parameters
from dynamics.sites import Site, SiteError
from tests.zoo.pair_models import mixer, pair_of, right_logit
from tests.zoo.small_models import D_VOCAB, tied, tokens, transformer


class Between(nn.Module):
    """A layer between an embedding and an unembedding."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer, self.unembed = nn.Embedding(D_VOCAB, 4), layer, nn.Linear(4, D_VOCAB)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, given: Tensor) -> Tensor:
        written = self.layer(self.embed(given))
        return self.unembed((written[0] if isinstance(written, tuple) else written) * self.scale)


class Backwards(nn.Module):
    """Each position reads those after it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1).cumsum(1).flip(1) @ self.weight


def patched(model: nn.Module, site: Site) -> None:
    chosen = dy.sites.at_positions([site], {"first": 0, "last": -1})
    patch_parameters(dy.Recipe(model), pair_of(model), [dy.Contrast(tokens(1))], chosen, right_logit)


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(4, 4, batch_first=True), Backwards(), nn.GroupNorm(1, 4)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_that_mixes_positions_is_refused(layer):
    model = Between(layer).double()
    if isinstance(layer, nn.GroupNorm):
        model.layer = nn.Sequential(nn.Flatten(1), nn.Unflatten(1, (4, 4)), layer)
    names = [name for name, _ in model.named_parameters() if name.startswith("layer")]
    with pytest.raises(SiteError, match="mixes positions"):
        patched(model, Site("layer", dict.fromkeys(names, ...)))


def test_a_parameter_that_no_layer_holds_is_refused():
    with pytest.raises(
        SiteError, match=r"'scale' belongs to no projection, so it cannot act at some positions"
    ):
        patched(Between(nn.Linear(4, 4)).double(), Site("scale", {"scale": ...}))


def test_a_parameter_that_is_read_outside_its_module_is_refused():
    with pytest.raises(
        SiteError, match=r"'embed @ first': embed.weight is used where its module is not called"
    ):
        patched(mixer(tied=True), Site("embed", {"embed.weight": ...}))
    patched(mixer(), Site("embed", {"embed.weight": ...}))


def test_a_tied_tensor_acts_in_all_layers_that_hold_it():
    assert [layer.owner for layer in layers_of(tied(), ["embed.weight"])] == ["embed", "unembed"]


def test_declared_projections_are_found_by_the_tensors_they_hold():
    found = layers_of(transformer(), ["blocks.1.attn.W_Q", "blocks.1.attn.b_O", "ln_final.w"])
    assert [(x.owner, x.projection.parameters) for x in found] == [
        ("blocks.1.attn", ("W_Q", "b_Q")),
        ("blocks.1.attn", ("W_O", "b_O")),
        ("ln_final", ("w", "b")),
    ]
