"""dy.cache beside autograd by hand and TransformerLens's own cache."""

import copy
import dataclasses

import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.sites import SiteError
from tests.zoo.signal_models import (
    COARSE,
    RECIPES,
    TOYS,
    batch_of,
    begun,
    off,
    read_by_hand,
    toy_recipe,
)
from tests.zoo.small_models import margin


@pytest.mark.parametrize("name", RECIPES)
def test_activations_and_signals_are_those_of_an_ordinary_pass_run_by_run(name):
    recipe, batch = RECIPES[name](), batch_of(name, 10)
    live = begun(recipe, name)
    values, signals = read_by_hand(recipe, live, batch, sites.hooks(recipe.model))
    kept = dy.cache(recipe, live.last, batch)
    numbered = {
        f"{n}[{i}]" if i else n: (value, signals[n][i])
        for n, runs in values.items()
        for i, value in enumerate(runs)
    }
    assert kept.activations.keys() == kept.signals.keys() == numbered.keys()
    finite = {n: torch.nan_to_num(s) for n, (_, s) in numbered.items()}
    assert off(kept.signals, finite) < (1e-6 if name in COARSE else 1e-13)
    assert all(torch.equal(kept.activations[n], value) for n, (value, _) in numbered.items())


@pytest.mark.parametrize("name", TOYS)
def test_on_the_toy_it_holds_what_transformer_lens_caches_forward_and_backward(name):
    recipe, batch = toy_recipe(name), batch_of(name, 10)
    model = copy.deepcopy(recipe.model)
    lens, forward, backward = model.get_caching_hooks(incl_bwd=True)
    with model.hooks(forward, backward):
        recipe.loss(model, batch).backward()
    _, forward_alone = model.run_with_cache(batch.tokens)
    kept = dy.cache(recipe, None, batch, "*hook_*")
    assert set(forward_alone) == kept.activations.keys()
    for hook, activation in kept.activations.items():
        assert torch.equal(activation, forward_alone[hook])
        assert off({hook: kept.signals[hook]}, {hook: lens[f"{hook}_grad"]}) < 1e-13
    assert len(kept.signals) > 20


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.*.hook_resid_pre", {"blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"}),
        ("blocks.1.attn.hook_[qk]", {"blocks.1.attn.hook_q", "blocks.1.attn.hook_k"}),
        ("hook_*", {"hook_embed", "hook_pos_embed"}),
        ("*embed", {"embed", "pos_embed", "unembed", "hook_embed", "hook_pos_embed"}),
        ("unembed", {"unembed"}),
    ],
)
def test_a_glob_picks_submodules_by_their_whole_name_and_changes_nothing_of_what_is_kept(pattern, expected):
    recipe, batch = toy_recipe(), batch_of("LN gelu", 10)
    kept, whole = dy.cache(recipe, None, batch, pattern), dy.cache(recipe, None, batch)
    assert kept.activations.keys() == kept.signals.keys() == expected
    for name in expected:
        assert torch.equal(kept.activations[name], whole.activations[name])
        assert torch.equal(kept.signals[name], whole.signals[name])


def test_a_glob_that_matches_nothing_says_what_there_is():
    with pytest.raises(SiteError, match=r"no submodule matches 'hook_z'.*blocks.0.attn.hook_q"):
        dy.cache(toy_recipe(), None, batch_of("LN gelu", 10), "hook_z")


def test_what_is_kept_is_detached_and_shares_no_memory_with_the_model_or_between_calls():
    recipe, batch = RECIPES["convolutions"](), batch_of("convolutions", 10)
    first, second = (dy.cache(recipe, None, batch) for _ in range(2))
    tensors = [*first.activations.values(), *first.signals.values()]
    assert not any(t.requires_grad or t.grad_fn for t in tensors)
    for tensor in tensors:
        tensor.fill_(torch.nan)
    third = dy.cache(recipe, None, batch)
    for name, activation in second.activations.items():
        assert torch.equal(activation, third.activations[name])
        assert torch.equal(second.signals[name], third.signals[name])


def test_signals_reach_below_frozen_parameters_and_behind_an_embedding_of_tokens():
    recipe, batch = RECIPES["odd"](), batch_of("odd", 10)
    thawed = copy.deepcopy(recipe.model).requires_grad_(True)
    free = dataclasses.replace(recipe, model=thawed)
    frozen = dataclasses.replace(recipe, model=copy.deepcopy(recipe.model).requires_grad_(False))
    frozen.model.head.bias.requires_grad_(True)  # so that there is anything to train
    expected = dy.cache(free, None, batch)
    for kept in (dy.cache(recipe, None, batch), dy.cache(frozen, None, batch)):
        assert kept.signals.keys() == expected.signals.keys()
        assert off(kept.signals, expected.signals) < 1e-15
    assert expected.signals["embed"].any()


def test_a_recipe_without_an_optimizer_is_enough_and_the_checkpoint_decides_the_weights():
    recipe, batch = RECIPES["MLP relu dropout"](), batch_of("MLP", 10)
    live = begun(recipe, "MLP")
    bare = dy.Recipe(recipe.model, recipe.loss)
    ours, theirs = (dy.cache(bare, state, batch) for state in (None, live.last))
    moved = dy.Recipe(live.model, recipe.loss)
    assert not torch.equal(ours.signals["inner"], theirs.signals["inner"])
    again = dy.cache(moved, live.last, batch)
    assert all(torch.equal(again.signals[n], s) for n, s in theirs.signals.items())


def test_the_step_that_is_recorded_is_the_step_that_is_taken():
    """Σ of the head's signals is its bias's gradient."""
    recipe, batch = RECIPES["MLP"](), batch_of("MLP", 10)
    kept = dy.cache(recipe, None, batch)
    pair = dy.Contrast(batch, batch, batch)
    after = []
    dy.patch_gradients(
        recipe,
        None,
        [pair],
        sites.parameters(recipe.model)[:1],
        lambda model, b: (after.append(model.upper.bias.clone()), margin(model, b))[1],
    )
    untouched, _, base, *_ = after
    assert off({"": untouched - base}, {"": kept.signals["upper"].sum(0)}) < 1e-13
