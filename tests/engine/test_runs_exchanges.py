"""Exchanging nothing, everything, disjoint sites, or a batch with itself."""

from itertools import pairwise

import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from tests.zoo.small_models import (
    CLIPS,
    OPTIMIZERS,
    classifier,
    classifier_recipe,
    gap,
    margin,
    outcomes,
    points,
    same,
    spread,
    tokens,
    trained,
    transformer_recipe,
)

VERBS = [dy.patch_gradients, dy.patch_updates]
PAIR = dy.Contrast(points(10), points(11), points(12))

every_verb = pytest.mark.parametrize("verb", VERBS)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
fresh_and_warm = pytest.mark.parametrize("start", [pytest.param("fresh", marks=pytest.mark.slow), "warm"])


def normed(start="warm", **changes):
    """A recipe whose model moves batch statistics and drops units, and a checkpoint of it."""
    recipe = classifier_recipe(
        model=classifier(norm=True, dropout=0.3), **{"clip": CLIPS["by norm"], **changes}
    )
    live = trained(recipe, [points(seed) for seed in range(3)])
    return recipe, live.last if start == "warm" else live.last.with_fresh_optimizer()


def nothing(model):
    """A site that covers no element of any parameter."""
    empty = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    return [Site("nothing", empty)]


@pytest.mark.slow
@every_verb
@every_optimizer
@fresh_and_warm
def test_patching_nothing_leaves_the_base_step_and_patching_everything_the_source_step_bitwise(
    verb, optimizer, start
):
    recipe, checkpoint = normed(start, optimizer=OPTIMIZERS[optimizer])
    some = (
        sites.parameters(recipe.model) * 4
    )  # everything comes in another stack of steps than base and source
    some = [Site(f"{i}", s.covers) for i, s in enumerate(some)]
    assert len(some) > 16
    everything = sites.everything(recipe.model)
    found = outcomes(verb, recipe, checkpoint, PAIR, [*nothing(recipe.model), *some, everything])
    assert same(found["nothing"], found["base"])
    assert same(found["everything"], found["source"])
    assert not same(found["source"], found["base"])


@every_verb
@pytest.mark.parametrize("clip", CLIPS)
def test_the_effect_of_everything_is_source_less_base_exactly(verb, clip):
    recipe, checkpoint = normed(clip=CLIPS[clip])
    result = verb(recipe, checkpoint, [PAIR], [sites.everything(recipe.model)], margin)
    gap_of_steps = (result["source"] - result["base"]).item()
    assert result["effect"].item() == gap_of_steps
    assert gap_of_steps != 0


@every_verb
def test_with_batch_normalisation_all_parameters_are_not_yet_everything(verb):
    recipe, checkpoint = normed()
    parameters = Site("parameters", dict.fromkeys(dict(recipe.model.named_parameters()), ...))
    statistics = Site("statistics", {"norm.running_mean": ..., "norm.running_var": ...})
    found = outcomes(verb, recipe, checkpoint, PAIR, [parameters, statistics])
    trained_names, buffer_names = (
        [n for n, _ in named] for named in (recipe.model.named_parameters(), recipe.model.named_buffers())
    )
    for name in trained_names:
        assert torch.equal(found["parameters"][name], found["source"][name])
        assert torch.equal(found["statistics"][name], found["base"][name])
    for name in buffer_names:
        assert torch.equal(found["parameters"][name], found["base"][name])
        assert torch.equal(found["statistics"][name], found["source"][name])
    result = verb(recipe, checkpoint, [PAIR], [parameters, statistics], margin)
    assert (result["effect"] != (result["source"] - result["base"])).all()
    assert (result["effect"] != 0).all()


@every_verb
@every_optimizer
@fresh_and_warm
def test_the_reference_steps_are_those_that_replay_takes(verb, optimizer, start):
    """Replay clips and steps with torch's own functions on the model itself."""
    recipe, checkpoint = normed(start, optimizer=OPTIMIZERS[optimizer])
    found = outcomes(verb, recipe, checkpoint, PAIR, nothing(recipe.model))
    for name, batch in (("base", PAIR.base), ("source", PAIR.source)):
        after = dy.steps.replay(recipe, checkpoint, batch)
        assert gap(found[name], after.parameters | after.buffers) < 1e-12
    assert same(found["untouched"], checkpoint.parameters | checkpoint.buffers)


@every_verb
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD momentum"])
@fresh_and_warm
def test_coasting_is_torchs_step_with_a_zero_gradient(verb, optimizer, start):
    recipe, checkpoint = normed(start, optimizer=OPTIMIZERS[optimizer])
    found = outcomes(verb, recipe, checkpoint, PAIR, nothing(recipe.model))["coasted"]
    model = classifier(norm=True)
    stepping = OPTIMIZERS[optimizer](model.parameters())
    checkpoint.restore(model, stepping)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepping.step()
    assert gap({n: found[n] for n, _ in model.named_parameters()}, dict(model.named_parameters())) < 1e-15


@every_verb
@every_optimizer
def test_a_batch_exchanged_with_itself_has_no_effect_at_all(verb, optimizer):
    recipe, checkpoint = normed(optimizer=OPTIMIZERS[optimizer])
    pair = dy.Contrast(PAIR.base, PAIR.base, PAIR.probe)
    patched = [*sites.parameters(recipe.model), sites.everything(recipe.model)]
    result = verb(recipe, checkpoint, [pair], patched, {"margin": margin, "spread": spread})
    assert (result["effect"] == 0).all()
    assert (result["source"] == result["base"]).all()
    assert (result["untouched"] != result["base"]).all()


@every_verb
@pytest.mark.parametrize("level", sites.LEVELS)
def test_a_batch_exchanged_with_itself_has_no_effect_at_any_level_of_a_transformer(verb, level):
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last
    pair = dy.Contrast(tokens(2), tokens(2), tokens(3))
    result = verb(recipe, checkpoint, [pair], sites.LEVELS[level](recipe.model), dy.measures.correct_logit)
    assert (result["effect"] == 0).all()


@every_verb
def test_a_token_in_neither_batch_is_a_site_without_effect(verb):
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last
    pair = dy.Contrast(tokens(2, below=9), tokens(3, below=9), tokens(4))
    row, used = Site("token 10", {"embed.W_E": (10,)}), Site("token 3", {"embed.W_E": (3,)})
    found = outcomes(verb, recipe, checkpoint, pair, [row, used])
    assert same(found["token 10"], found["base"])
    assert not same(found["token 3"], found["base"])


@pytest.mark.slow
@pytest.mark.parametrize("level", ["components", "heads", "matrices", "layers"])
@fresh_and_warm
def test_updates_of_disjoint_sites_add_up_to_the_update_of_their_union(level, start):
    recipe = transformer_recipe()
    live = trained(recipe, [tokens(0), tokens(1)])
    checkpoint = live.last if start == "warm" else live.last.with_fresh_optimizer()
    pair = dy.Contrast(tokens(2), tokens(3), tokens(4))
    parts = sites.LEVELS[level](recipe.model)
    found = outcomes(dy.patch_updates, recipe, checkpoint, pair, [*parts, *unions(parts)])
    base = found["base"]
    for i, union in enumerate(unions(parts)):
        one, other = found[parts[i].label], found[parts[i + 1].label]
        for name, tensor in found[union.label].items():
            if tensor.is_floating_point():
                total = (one[name] - base[name]) + (other[name] - base[name])
                assert torch.equal(tensor - base[name], total)


def unions(parts):
    """Of each site with the next; slices of one tensor are united by a mask."""
    found = []
    for one, other in pairwise(parts):
        covers = {name: index for site in (one, other) for name, index in site.covers.items()}
        for name in one.covers.keys() & other.covers.keys():
            covers[name] = (
                slice(
                    min(one.covers[name][0], other.covers[name][0]),
                    1 + max(one.covers[name][0], other.covers[name][0]),
                ),
            )
        found.append(Site(f"{one.label} with {other.label}", covers))
    return found
