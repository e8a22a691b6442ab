"""Truths about patched signals that need no second implementation."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.sites import Site
from tests.zoo.signal_models import (
    RECIPES,
    TOYS,
    activation,
    batch_of,
    begun,
    contrast_of,
    hooked,
    largest,
    off,
    patching,
    revealed,
    tolerance_of,
    toy_recipe,
)
from tests.zoo.small_models import ADAMW, CLIPS, gap, outcomes, same, tokens

pytestmark = pytest.mark.slow

every_model = pytest.mark.parametrize("name", RECIPES)
either_forward = pytest.mark.parametrize("forward", ["base", "source"])


def ran(recipe, batch):
    """Sites of every activation that is there, whole.

    Without identities in the place of norms: they give the residual stream itself, and to tap them is to add
    up its gradient in another order.
    """
    names = [n for n in dy.cache(recipe, None, batch).signals if "[" not in n]
    return [Site(n, {n: ...}) for n in names if type(recipe.model.get_submodule(n)) is not nn.Identity]


# --- nothing, oneself, everything -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        *[(n, "base") for n in ("MLP", "MLP relu dropout", "convolutions", "LSTM", "odd", "tied", "GPT-2")],
        *[(n, "source") for n in ("MLP relu dropout", "convolutions", "odd", "Llama")],
        pytest.param("LN gelu", "base"),
        pytest.param("RMS relu", "source"),
    ],
)
def test_a_batch_whose_signals_are_exchanged_with_its_own_moves_nothing_to_the_bit(name, forward):
    """Also where base and source are equal batches and not the same one."""
    recipe = RECIPES[name]()
    pair = dy.Contrast(batch_of(name, 10), batch_of(name, 10), batch_of(name, 12))
    found = outcomes(patching(forward), recipe, begun(recipe, name).last, pair, ran(recipe, pair.base))
    for label in found.keys() - {"untouched", "coasted"}:
        assert same(found[label], found["base"]), label
    assert not same(found["untouched"], found["base"])


@pytest.mark.parametrize(("name", "forward"), [("no norm", "base"), ("attention only", "source")])
def test_a_transformers_signals_exchanged_with_its_own_move_nothing_but_for_rounding(name, forward):
    recipe = RECIPES[name]()
    pair = dy.Contrast(batch_of(name, 10), batch_of(name, 10), batch_of(name, 12))
    patched = sites.activations(recipe.model, "*")
    found = revealed(patching(forward), recipe, begun(recipe, name).last, pair, patched)
    assert max(off(found[site.label], found["base"]) for site in patched) < 1e-14


@pytest.mark.parametrize("clip", ["by norm", "by value"])
def test_the_effect_of_exchanging_a_batch_with_itself_is_zero_through_clipping_and_optimizer(clip):
    recipe = toy_recipe(optimizer=ADAMW, clip=CLIPS[clip])
    batch = tokens(2)
    pair = dy.Contrast(batch, batch, tokens(4))
    measure = dy.measures.correct_logit
    patched = sites.activations(recipe.model, "blocks.1.*hook_*")
    result = dy.patch_signals(recipe, begun(recipe).last, [pair], patched, measure)
    assert (result["source"] == result["base"]).all()
    assert (result["untouched"] != result["base"]).all()
    assert (result["effect"] == 0).all()


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        *[("MLP relu dropout", "base"), ("convolutions", "source"), ("GPT-NeoX", "base")],
        pytest.param("LN gelu", "source"),
    ],
)
def test_a_site_that_covers_no_element_leaves_the_base_step_to_the_bit(name, forward):
    recipe, pair = RECIPES[name](), contrast_of(name)
    shapes = {n: a.shape for n, a in dy.cache(recipe, None, pair.base).activations.items()}
    nothing = [
        Site(s.label, {s.label: torch.zeros(shapes[s.label], dtype=torch.bool)})
        for s in ran(recipe, pair.base)
        if f"{s.label}[1]" not in shapes or shapes[f"{s.label}[1]"] == shapes[s.label]
    ]
    found = outcomes(patching(forward), recipe, None, pair, nothing)
    assert all(same(found[site.label], found["base"]) for site in nothing)
    assert not same(found["source"], found["base"])


LAST = {
    **dict.fromkeys(("MLP", "MLP relu dropout"), "upper"),
    **dict.fromkeys(("convolutions", "LSTM", "odd"), "head"),
    **dict.fromkeys((*TOYS, "tied"), "unembed"),
    **dict.fromkeys(("GPT-2", "GPT-NeoX", "Llama"), "lm_head"),
}


@every_model
def test_at_the_end_of_the_model_all_gradients_are_the_sources_signal_pulled_back_through_the_base_run(name):
    """J_Uᵀ λ_R, whatever the loss of the base batch."""
    recipe, pair = RECIPES[name](), contrast_of(name)
    checkpoint = Checkpoint.capture(recipe.model)
    last = LAST[name]
    with checkpoint.random_state():
        theirs, loss = activation(recipe.model, recipe.loss, pair.source, last)
        (signal,) = torch.autograd.grad(loss, theirs)
    with checkpoint.random_state():
        ours, _ = activation(recipe.model, recipe.loss, pair.base, last)
    named = dict(recipe.model.named_parameters())
    wanted = {n: p for n, p in named.items() if p.requires_grad}
    pulled = torch.autograd.grad(ours, wanted.values(), signal, allow_unused=True)
    expected = {n: torch.zeros_like(p) for n, p in named.items()}
    expected |= {n: g for n, g in zip(wanted, pulled, strict=True) if g is not None}
    found = revealed(dy.patch_signals, recipe, checkpoint, pair, [Site("end", {last: ...})])
    assert off(found["end"], expected) < tolerance_of(name)
    assert off(found["end"], found["source"]) > 1e-2


def test_buffers_after_the_step_are_those_of_the_base_run():
    recipe, pair = RECIPES["convolutions"](), contrast_of("convolutions")
    patched = ran(recipe, pair.base)
    found = outcomes(dy.patch_signals, recipe, begun(recipe, "convolutions").last, pair, patched)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert all(torch.equal(found[site.label][name], found["base"][name]) for site in patched)
        assert not torch.equal(found["base"][name], found["untouched"][name])


# --- ancestors --------------------------------------------------------------------------------------------


@every_model
def test_only_the_gradients_of_an_activations_ancestors_change(name):
    """All others keep the bits of the base run's; who is an ancestor, autograd says."""
    recipe, pair = RECIPES[name](), contrast_of(name)
    recipe = dataclasses.replace(recipe, optimizer=ADAMW)
    patched = ran(recipe, pair.base)
    patched = patched[:: 1 + len(patched) // 10]
    found = outcomes(dy.patch_signals, recipe, None, pair, patched)
    named = {n: p for n, p in recipe.model.named_parameters() if p.requires_grad}
    n_others = 0
    for site in patched:
        kept, _ = every_run(recipe, pair.base, site.label)
        ancestors = set()
        for a in kept:
            if a.requires_grad:
                gradients = torch.autograd.grad(a.sum(), named.values(), allow_unused=True, retain_graph=True)
                ancestors |= {n for n, g in zip(named, gradients, strict=True) if g is not None}
        changed = {n for n in named if not torch.equal(found[site.label][n], found["base"][n])}
        assert changed <= ancestors, site.label
        n_others += len(named.keys() - ancestors)
    assert n_others > len(patched) or name == "tied"


def every_run(recipe, batch, name):
    kept = []
    with torch.random.fork_rng(), hooked(recipe.model, {name: lambda a: (kept.append(a), a.clone())[1]}):
        return kept, recipe.loss(recipe.model, batch)


def test_at_the_residual_stream_every_parameter_below_changes_and_none_above():
    recipe, pair = toy_recipe(), contrast_of("LN gelu")
    patched = sites.activations(recipe.model, "blocks.1.hook_resid_pre")
    found = revealed(dy.patch_signals, recipe, None, pair, patched)
    (site,) = patched
    scale = largest(found["base"])
    for name, gradient in found[site.label].items():
        moved = float((gradient - found["base"][name]).abs().max()) / scale
        if name.startswith(("blocks.1.", "ln_final.", "unembed.")):
            assert moved == 0, name
        elif not name.endswith("b_K"):  # whose gradient is zero
            assert moved > 1e-3, name


def test_a_tied_tensor_is_an_ancestor_by_one_of_its_uses_and_keeps_the_base_gradient_of_the_other():
    recipe, pair = RECIPES["tied"](), contrast_of("tied")
    model = recipe.model
    embedded, loss = activation(model, recipe.loss, pair.base, "embed")
    through = torch.autograd.grad(loss, model.mix.weight, retain_graph=True)[0]
    cut = embedded.detach().requires_grad_()
    apart = nn.functional.linear(model.mix(cut).tanh(), model.unembed.weight)
    rows = torch.arange(len(pair.base))
    loss = nn.functional.cross_entropy(apart[rows, pair.base.target_pos], pair.base.targets)
    as_unembedding, ours = torch.autograd.grad(loss, [model.unembed.weight, cut])
    theirs = dy.cache(recipe, None, pair.source).signals["embed"]
    as_embedding = torch.autograd.grad(embedded, model.embed.weight, theirs)[0]
    found = revealed(dy.patch_signals, recipe, None, pair, [Site("embed", {"embed": ...})])["embed"]
    assert gap({"w": found["embed.weight"]}, {"w": as_unembedding + as_embedding}) < 1e-13
    assert gap({"w": found["mix.weight"]}, {"w": through}) < 1e-13
    assert off({"w": theirs}, {"w": ours}) > 0.1


def test_an_activation_that_reaches_no_loss_has_a_signal_of_zero_and_no_effect():
    recipe, pair = RECIPES["odd"](), contrast_of("odd")
    assert not dy.cache(recipe, None, pair.base).signals["aside"].any()
    found = outcomes(dy.patch_signals, recipe, None, pair, [Site("aside", {"aside": ...})])
    assert same(found["aside"], found["base"])


def test_below_a_frozen_embedding_there_is_nothing_to_move():
    recipe, pair = RECIPES["odd"](), contrast_of("odd")
    found = outcomes(dy.patch_signals, recipe, None, pair, [Site("embed", {"embed": ...})])
    assert same(found["embed"], found["base"])
    assert largest({"λ": dy.cache(recipe, None, pair.base).signals["embed"]}) > 1e-3


# --- finite differences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.attn.hook_pattern", "ln_final"])
def test_finite_differences_of_the_injected_loss_are_the_patched_gradient(hook):
    """L_U(θ) + <λ_R − λ_U, a_U(θ)> with both signals frozen: gradcheck, and the verb's gradient beside it."""
    recipe, pair = toy_recipe(), contrast_of("LN gelu")
    model = recipe.model
    signals = [dy.cache(recipe, None, batch, hook).signals[hook] for batch in (pair.base, pair.source)]
    difference = signals[1] - signals[0]
    named = dict(model.named_parameters())
    chosen = {
        n: named[n].detach().clone().requires_grad_()
        for n in (
            "blocks.0.attn.b_V",
            "blocks.0.mlp.b_out",
            "blocks.0.ln1.w",
            "blocks.1.attn.b_Q",
            "ln_final.w",
        )
    }

    def injected(*values):
        kept = []
        model.get_submodule(hook).register_forward_hook(lambda _, __, a: kept.append(a))
        hooks = model.get_submodule(hook)._forward_hooks
        try:
            logits = torch.func.functional_call(
                model, dict(zip(chosen, values, strict=True)), (pair.base.tokens,)
            )
        finally:
            hooks.popitem()
        rows = torch.arange(len(pair.base))
        loss = nn.functional.cross_entropy(logits[rows, pair.base.target_pos], pair.base.targets)
        return loss + (difference * kept[0]).sum()

    assert torch.autograd.gradcheck(injected, tuple(chosen.values()), eps=1e-6, atol=1e-8)
    analytic = dict(
        zip(chosen, torch.autograd.grad(injected(*chosen.values()), chosen.values()), strict=True)
    )
    found = revealed(dy.patch_signals, recipe, None, pair, [Site("here", {hook: ...})])
    assert off({n: found["here"][n] for n in chosen}, analytic) < 1e-12
    assert off({n: found["base"][n] for n in chosen}, analytic) > 1e-3


# --- bookkeeping ------------------------------------------------------------------------------------------


def test_sites_and_contrasts_in_one_call_give_what_calls_one_by_one_give():
    recipe = toy_recipe(optimizer=ADAMW, clip=CLIPS["by norm"])
    checkpoint = begun(recipe).last
    pairs = [dy.Contrast(tokens(i), tokens(i + 1), tokens(i + 2), {"example": f"{i}"}) for i in (2, 5)]
    pairs.append(dataclasses.replace(pairs[0], probe=tokens(9), coords={"example": "another probe"}))
    patched = sites.activations(recipe.model, "blocks.1.*hook_*")
    patched += sites.activations(
        recipe.model, "blocks.1.attn.hook_z", by=("layer", "head", "pos"), like=pairs[0].base
    )
    assert len(patched) > 16
    measures = {m.name: m for m in (dy.measures.correct_logit, dy.measures.correct_log_prob)}
    whole = dy.patch_signals(recipe, checkpoint, pairs, patched, measures)
    for pair in pairs:
        for site in patched[::17]:
            one = dy.patch_signals(recipe, checkpoint, [pair], [site], measures)
            for name in ("patched", "effect", "base", "source", "untouched", "coasted"):
                there = whole[name].sel(example=pair.coords["example"])
                there = there.sel(site=site.label) if "site" in there.dims else there
                atol = 1e-12 if "site" in whole[name].dims else 0  # sites are batched, references are not
                np.testing.assert_allclose(there.values, one[name].values.squeeze(), rtol=0, atol=atol)
    assert (whole["effect"] == whole["patched"] - whole["base"]).all()


def test_the_references_are_those_of_patch_gradients():
    recipe = toy_recipe(optimizer=ADAMW, clip=CLIPS["by norm"])
    checkpoint, pair = begun(recipe).last, contrast_of("LN gelu")
    measure = dy.measures.correct_logit
    one = dy.patch_signals(recipe, checkpoint, [pair], sites.activations(recipe.model, "embed"), measure)
    other = dy.patch_gradients(recipe, checkpoint, [pair], [sites.everything(recipe.model)], measure)
    for name in ("base", "source", "untouched", "coasted"):
        assert one[name].item() == other[name].item()


def test_necessity_is_the_same_verb_on_the_reversed_contrast():
    recipe, pair = toy_recipe(), contrast_of("LN gelu")
    patched = sites.activations(recipe.model, "blocks.*.attn.hook_z")
    measure = dy.measures.correct_logit
    both = dy.both_directions(dy.patch_signals, recipe, None, [pair], patched, measure)
    reverse = dy.patch_signals(recipe, None, [pair.reversed()], patched, measure)
    assert (both["effect"].sel(direction="necessity").values == reverse["effect"].values).all()
    assert (
        both["base"].sel(direction="necessity").item() == both["source"].sel(direction="sufficiency").item()
    )
