"""patch_activations and interchange between two checkpoints, beside hooks written by hand on two models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import dynamics as dy
from checkpoints import Checkpoint, CheckpointPair, RngState
from dynamics.recipe import RecipeError
from tests.oracles.forward_hooks import outputs_of, patched_by_hand
from tests.zoo.pair_models import (
    MODELS,
    batch_for,
    loaded,
    measure_for,
    measured,
    mixer,
    pair_of,
    right_logit,
)
from tests.zoo.small_models import points, tokens, transformer

PLACES = {
    "toy": ("blocks.*.attn.hook_z", ("layer", "head", "pos")),
    "mixer": ("up", ("pos",)),
    "mlp": ("encoder", ()),
    "gpt2": ("transformer.h.*.mlp", ("layer", "pos")),
    "llama": ("model.layers.*.self_attn.v_proj", ("layer",)),
}


def sites_of(name, model):
    pattern, by = PLACES[name]
    given = batch_for(name, 0)
    like = given[0] if name == "mlp" else given.tokens
    return dy.sites.activations(model, pattern, by=by, like=like)


@pytest.mark.parametrize("name", MODELS)
def test_the_sources_activation_on_the_source_batch_goes_into_the_bases_run(name):
    model, measure = MODELS[name](), measure_for(name)
    pair, chosen = pair_of(model), sites_of(name, model)
    contrasts = [dy.Contrast(batch_for(name, 1), batch_for(name, 2)), dy.Contrast(batch_for(name, 3))]
    found = dy.patch_activations(dy.Recipe(model), pair, contrasts, chosen, measure)
    base, source = loaded(model, pair.base), loaded(model, pair.source)
    for example, contrast in enumerate(contrasts):
        given = contrast.base if contrast.source is None else contrast.source
        assert found["base"].values[example] == pytest.approx(
            measured(base, contrast.base, measure), abs=1e-12
        )
        assert found["source"].values[example] == pytest.approx(measured(source, given, measure), abs=1e-12)
        for i, site in enumerate(chosen):
            values = outputs_of(source, given, measure, list(site.covers))
            by_hand = patched_by_hand(base, contrast.base, measure, site.covers, values)
            assert found["patched"].values[example, i] == pytest.approx(by_hand, abs=1e-12)
    assert (np.abs(found["effect"]) > 1e-9).mean() > 0.5  # what comes after the answer has none


@pytest.mark.parametrize("values", ["source", "mean", "zero"])
def test_transformer_lens_and_hooks_find_the_same_whatever_is_put_in(values):
    model = transformer()
    contrasts = [dy.Contrast(tokens(1), tokens(2)), dy.Contrast(tokens(3), tokens(4))]
    arguments = dy.Recipe(model), pair_of(model), contrasts, sites_of("toy", model)
    lens = dy.patch_activations(*arguments, {"it": dy.measures.correct_logit}, values)
    hooks = dy.patch_activations(*arguments, {"it": right_logit}, values)
    assert "generic_activation_patch" in lens.attrs["provenance"]
    assert "generic_activation_patch" not in hooks.attrs["provenance"]
    np.testing.assert_allclose(lens["patched"], hooks["patched"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_pair_of_one_checkpoint_on_one_batch_changes_nothing_exactly(name):
    model = MODELS[name]()
    same = pair_of(model).source
    contrasts = [dy.Contrast(batch_for(name, 1))]
    recipe, chosen = dy.Recipe(model), sites_of(name, model)
    found = dy.patch_activations(recipe, CheckpointPair(same, same), contrasts, chosen, measure_for(name))
    assert (found["effect"] == 0).all()
    assert found["base"].equals(found["source"])


@pytest.mark.parametrize("name", MODELS)
def test_a_pair_of_one_checkpoint_is_that_checkpoint(name):
    model = MODELS[name]()
    same = pair_of(model).source
    contrasts = [dy.Contrast(batch_for(name, 1), batch_for(name, 2))]
    recipe, chosen = dy.Recipe(model), sites_of(name, model)
    pair, alone = (
        dy.patch_activations(recipe, given, contrasts, chosen, measure_for(name))
        for given in (CheckpointPair(same, same), same)
    )
    assert pair.equals(alone)


def test_everything_that_flows_exchanged_is_the_source():
    model = transformer()
    last = dy.sites.activations(model, "blocks.1.hook_resid_post")
    pair = pair_of(model)
    after = [n for n in pair.base.parameters if n.startswith(("ln_final", "unembed"))]
    pair.source.parameters.update({n: pair.base.parameters[n] for n in after})
    contrasts = [dy.Contrast(tokens(1))]
    found = dy.patch_activations(dy.Recipe(model), pair, contrasts, last, dy.measures.correct_logit)
    np.testing.assert_allclose(found["patched"].squeeze("site"), found["source"], rtol=0, atol=1e-12)
    assert abs(found["source"] - found["base"]).item() > 1e-3


def test_interchange_reads_the_probabilities_of_tokens_in_the_base_checkpoint():
    model = transformer()
    pair, chosen = pair_of(model), sites_of("toy", model)[:3]
    chosen_tokens = {"a": 3, "b": 7}
    found = dy.interchange(dy.Recipe(model), pair, [dy.Contrast(tokens(1))], chosen, chosen_tokens)
    base, source = loaded(model, pair.base), loaded(model, pair.source)
    rows = torch.arange(len(tokens(1)))
    for word, number in chosen_tokens.items():

        def chance(given, batch, number=number):
            return given(batch.tokens)[rows, batch.target_pos].softmax(-1)[:, number]

        for i, site in enumerate(chosen):
            values = outputs_of(source, tokens(1), chance, list(site.covers))
            by_hand = patched_by_hand(base, tokens(1), chance, site.covers, values)
            assert found["patched"].sel(measure=word).values[0, i] == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("verb", [dy.patch_activations, dy.patch_parameters])
def test_necessity_is_the_reversed_pair_on_reversed_contrasts_measured_alike(verb):
    model = mixer()
    pair = pair_of(model)
    contrasts = [dy.Contrast(tokens(1), tokens(2)), dy.Contrast(tokens(3))]
    chosen = sites_of("mixer", model) if verb is dy.patch_activations else dy.sites.parameters(model)
    found = dy.both_directions(verb, dy.Recipe(model), pair, contrasts, chosen, right_logit)
    there, back = (found.sel(direction=way, drop=True) for way in ("sufficiency", "necessity"))
    assert there.equals(verb(dy.Recipe(model), pair, contrasts, chosen, right_logit))
    np.testing.assert_array_equal(there["base"], back["source"])
    np.testing.assert_array_equal(there["source"], back["base"])


@pytest.mark.parametrize("verb", [dy.patch_activations, dy.patch_parameters])
def test_a_measure_draws_the_base_checkpoints_random_numbers_in_both_models(verb):
    model = mixer()
    base = pair_of(model).base
    with torch.random.fork_rng():
        torch.manual_seed(5)
        source = replace(base, rng=RngState.capture())
    chosen = sites_of("mixer", model) if verb is dy.patch_activations else dy.sites.parameters(model)

    def noisy(given, batch):
        return right_logit(given, batch) + torch.rand(len(batch))

    found = verb(dy.Recipe(model), CheckpointPair(base, source), [dy.Contrast(tokens(1))], chosen, noisy)
    np.testing.assert_array_equal(found["source"], found["base"])
    assert (found["effect"] == 0).all()


def test_interactions_of_exchanged_parameters_are_those_of_unions():
    model = mixer()
    pair, chosen, contrasts = pair_of(model), dy.sites.parameters(model)[:3], [dy.Contrast(tokens(1))]
    found = dy.interactions(dy.Recipe(model), pair, contrasts, chosen, right_logit, dy.patch_parameters)
    together = dy.sites.union(model, chosen[:2])
    whole = dy.patch_parameters(dy.Recipe(model), pair, contrasts, [together], right_logit)["effect"].item()
    alone = found["effect"].values[0, :2].sum()
    assert found["interaction"].values[0, 0, 1] == pytest.approx(whole - alone, abs=1e-12)


def test_the_step_of_the_source_stands_in_the_provenance():
    model = mixer()
    pair, chosen = pair_of(model), sites_of("mixer", model)
    found = dy.patch_activations(dy.Recipe(model), pair, [dy.Contrast(tokens(1))], chosen, right_logit)
    assert '"source_step": 20, "step": 10' in found.attrs["provenance"]


def test_one_checkpoint_still_needs_source_batches():
    model = mixer()
    for verb in (dy.patch_activations, dy.attribute_activations):
        with pytest.raises(ValueError, match=r"exchanges between two batches, and contrast 0 has no source"):
            verb(dy.Recipe(model), None, [dy.Contrast(tokens(1))], sites_of("mixer", model), right_logit)


def test_a_pair_that_does_not_fit_or_is_not_taken_is_refused():
    model = mixer()
    recipe, rest = dy.Recipe(model), ([dy.Contrast(tokens(1))], sites_of("mixer", model), right_logit)
    with pytest.raises(RecipeError, match="does not fit the recipe's model"):
        dy.patch_activations(recipe, pair_of(transformer()), *rest)
    with pytest.raises(
        TypeError, match=r"attribute_activations takes a checkpoint .* given a CheckpointPair"
    ):
        dy.attribute_activations(recipe, pair_of(model), *rest)


def test_the_users_model_is_left_as_it_was():
    model = MODELS["mlp"]().train()
    before = Checkpoint.capture(model)
    contrasts = [dy.Contrast(points(1), points(2))]
    dy.patch_activations(
        dy.Recipe(model), pair_of(model), contrasts, sites_of("mlp", model), measure_for("mlp")
    )
    assert Checkpoint.capture(model).equals(before)
    assert model.training
