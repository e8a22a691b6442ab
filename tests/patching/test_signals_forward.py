"""The source's activation given forward, straight through, while its signal is exchanged."""

import dataclasses

import pytest
import torch

import dynamics as dy
from dynamics.sites import Site
from tests.zoo.signal_models import (
    RECIPES,
    TOYS,
    activation,
    contrast_of,
    largest,
    off,
    patching,
    revealed,
    tolerance_of,
    toy_recipe,
)

either_forward = pytest.mark.parametrize("forward", ["base", "source"])

CUTS = {
    **dict.fromkeys(TOYS, "blocks.1.hook_resid_pre"),
    "MLP": "drop",
    "GPT-2": "transformer.h.0",
    "GPT-NeoX": "gpt_neox.layers.0",
    "Llama": "model.layers.0",
    "LSTM": "lstm",
}


@pytest.mark.parametrize("name", CUTS)
def test_at_a_full_cut_everything_above_has_the_sources_gradient_and_all_below_its_signal(name):
    recipe, pair = RECIPES[name](), contrast_of(name)
    # the loss above the cut reads the targets: the same ones, so that above it the runs are one
    pair = dataclasses.replace(pair, base=with_targets_of(pair.base, pair.source))
    site = Site("cut", {CUTS[name]: ...})
    found = revealed(patching("source"), recipe, None, pair, [site])
    theirs, loss = activation(recipe.model, recipe.loss, pair.source, CUTS[name])
    (signal,) = torch.autograd.grad(loss, theirs)
    ours, _ = activation(recipe.model, recipe.loss, pair.base, CUTS[name])
    named = dict(recipe.model.named_parameters())
    pulled = dict(
        zip(named, torch.autograd.grad(ours, named.values(), signal, allow_unused=True), strict=True)
    )
    above = {n: found["source"][n] for n, g in pulled.items() if g is None}
    below = {n: g for n, g in pulled.items() if g is not None and "wte" not in n}
    scale = largest(found["source"])
    assert off({n: found["cut"][n] for n in above}, above, scale) < tolerance_of(name)
    assert off({n: found["cut"][n] for n in below}, below, scale) < tolerance_of(name)
    assert off({n: found["base"][n] for n in above}, above, scale) > 1e-2
    assert off({n: found["source"][n] for n in below}, below, scale) > 1e-2


def with_targets_of(base, source):
    if isinstance(base, tuple):
        return base[0], source[1]
    return dataclasses.replace(base, target_pos=source.target_pos, targets=source.targets)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("where", ["everywhere", "at one position", "under a mask"])
def test_the_activation_that_goes_forward_is_the_sources_to_the_bit_and_elsewhere_the_bases(name, where):
    recipe, pair = toy_recipe(name), contrast_of(name)
    hook, reader = "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"
    shape = dy.cache(recipe, None, pair.base, hook).activations[hook].shape
    random = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    index = {"everywhere": ..., "at one position": (slice(None), 1), "under a mask": random}[where]
    covered = torch.zeros(shape, dtype=torch.bool)
    covered[index] = True
    base, source = (dy.cache(recipe, None, b, hook).activations[hook] for b in (pair.base, pair.source))
    attention = recipe.model.blocks[1].attn

    def out(z):
        return torch.einsum("bphe,hed->bpd", z, attention.W_O) + attention.b_O

    seen = []
    handle = recipe.model.get_submodule(reader).register_forward_hook(
        lambda _, __, a: seen.append(a.detach())
    )
    for forward, expected in (("source", torch.where(covered, source, base)), ("base", base)):
        seen.clear()
        dy.patch_signals(
            recipe, None, [pair], [Site("z", {hook: index})], lambda *_: torch.zeros(()), forward=forward
        )
        assert torch.equal(seen[-1], out(expected))
    handle.remove()


@pytest.mark.slow
@either_forward
@pytest.mark.parametrize("name", TOYS)
def test_masked_scores_of_minus_infinity_stay_finite(name, forward):
    """Also where the exchanged positions are the masked ones alone: those have no signal in either run."""
    recipe, pair = toy_recipe(name), contrast_of(name)
    hook = "blocks.0.attn.hook_attn_scores"
    kept = dy.cache(recipe, None, pair.base, hook)
    masked = kept.activations[hook] == -torch.inf
    assert masked.any()
    assert not kept.signals[hook][masked].any()
    patched = [Site("all", {hook: ...}), Site("masked", {hook: masked}), Site("seen", {hook: ~masked})]
    found = revealed(patching(forward), recipe, None, pair, patched)
    for label in ("all", "masked", "seen"):
        assert all(torch.isfinite(g).all() for g in found[label].values())
    assert off(found["masked"], found["base"]) == 0
    assert off(found["seen"], found["all"]) == 0
    assert off(found["all"], found["base"]) > 1e-4
