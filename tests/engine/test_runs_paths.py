"""A result says which way its gradients, steps, signals and measures were computed, and why a fast way was left."""

import json
import logging

import numpy as np
import pytest
import torch
from torch.optim import Adagrad

import dynamics as dy
from dynamics import results, sites
from dynamics.engine import measure_gradients, measuring
from dynamics.engine.measuring import Measuring
from dynamics.steps import per_example
from dynamics.steps.fallbacks import Fallback
from dynamics.steps.pullbacks import Pullbacks
from dynamics.steps.update import Steps
from tests.zoo.signal_models import RECIPES
from tests.zoo.small_models import tokens, transformer_recipe

LOGIT = dy.measures.correct_logit
PAIRS = [dy.Contrast(tokens(i), tokens(i + 10), tokens(i + 20), {"example": f"pair {i}"}) for i in range(3)]
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def paths(found):
    return json.loads(found.attrs["provenance"])["paths"]


def patched(recipe, verb=dy.patch_gradients, measure=LOGIT, contrasts=PAIRS, n=6):
    return verb(recipe, None, contrasts, sites.parameters(recipe.model)[:n], measure)


def activations(recipe, verb, measure=LOGIT):
    hooks = sites.activations(recipe.model, "blocks.*.hook_mlp_out", by=("layer", "pos"), like=PAIRS[0].base)
    return verb(recipe, None, PAIRS, hooks, measure)


def test_the_fast_ways_of_a_toy_are_named_and_nothing_is_logged(caplog):
    recipe = transformer_recipe()
    with caplog.at_level(logging.WARNING, "dynamics"):
        gradients, updates = patched(recipe), patched(recipe, dy.patch_updates)
        step = patched(recipe, dy.attribute_step)
        signals, forward = activations(recipe, dy.patch_signals), activations(recipe, dy.patch_activations)
    assert caplog.records == []
    assert "vmap(grad)" in paths(gradients)["gradients"]
    assert paths(gradients)["measures"] == paths(updates)["measures"] == "vmap over models"
    assert "all at once" in paths(gradients)["steps"]
    assert "elements of two finished steps" in paths(updates)["steps"]
    assert paths(step)["gradients of the measure"] == "vmap over the nodes of a path"
    assert "one batched backward pass" in paths(signals)["signals"]
    assert "TransformerLens" in paths(forward)["patches"]


def test_a_model_that_vmap_does_not_take_says_so_in_the_result_and_once_in_the_log(caplog):
    with caplog.at_level(logging.WARNING, "dynamics"):
        said = paths(patched(RECIPES["LSTM"](), n=2))
    assert said["gradients"].startswith("a backward pass for each batch, since ")
    assert said["measures"].startswith("one model at a time, since ")
    logged = [f"patch_gradients: {part}: {said[part]}" for part in ("gradients", "measures")]
    assert [record.getMessage() for record in caplog.records] == logged


def test_an_optimizer_that_needs_its_own_step_is_named():
    found = patched(transformer_recipe(optimizer=Adagrad))
    said = "the optimizer itself, one step at a time, since Adagrad is not AdamW, Adam or SGD"
    assert paths(found)["steps"] == said


def test_a_measure_of_the_users_own_is_taken_of_all_models_at_once():
    found = patched(transformer_recipe(), measure=lambda model, batch: model(batch.tokens).mean((1, 2)))
    assert paths(found)["measures"] == "vmap over models"


def test_a_measure_that_keeps_what_it_sees_is_taken_one_by_one_and_says_so():
    kept = []

    def measure(model, batch):
        kept.append(model(batch.tokens).mean((1, 2)))
        return kept[-1]

    found = patched(transformer_recipe(), measure=measure, contrasts=PAIRS[:1])
    assert paths(found)["measures"] == (
        "one model at a time, since a measure writes into a list that it reaches, which one call for all models "
        "would spoil"
    )
    assert [float(value.mean()) for value in kept] == [
        *(found[name].item() for name in ("untouched", "coasted", "base", "source")),
        *found["patched"].values[0].tolist(),
    ]


def test_settings_of_activation_verbs_are_kept_beside_the_paths():
    found = activations(transformer_recipe(), dy.attribute_activations)
    facts = json.loads(found.attrs["provenance"])
    assert facts["method"] == "first_order"
    assert facts["paths"]["contrasts"] == "contrasts of one shape as one batch"


@pytest.mark.slow
def test_joined_results_keep_every_path_that_one_of_them_took():
    recipe, slow = transformer_recipe(), transformer_recipe(optimizer=Adagrad)
    joined = results.concat([patched(recipe), patched(slow)], "optimizer", ["fast", "slow"])
    assert paths(joined)["steps"].split("; ") == [
        paths(patched(recipe))["steps"],
        paths(patched(slow))["steps"],
    ]


# --- out of memory ----------------------------------------------------------------------------------------


def failing_above(monkeypatch, owner, name, most, size_of):
    """The function, with memory for so many at a time and no more; the sizes that were tried."""
    take, tried = getattr(owner, name), []

    def limited(*args, **kwargs):
        tried.append(size_of(*args, **kwargs))
        if tried[-1] > most:
            raise FULL
        return take(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)
    return tried


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize(
    ("verb", "owner", "name", "size_of", "part"),
    [
        ("patch_gradients", Measuring, "_vmapped", lambda self, models, probe: len(models), "measures"),
        ("patch_updates", Measuring, "_vmapped", lambda self, models, probe: len(models), "measures"),
        ("patch_gradients", Steps, "begin", lambda self, many, space=None: len(many), "steps"),
        ("patch_gradients", per_example, "_together", lambda r, c, batches, first: len(batches), "gradients"),
        ("patch_signals", Pullbacks, "exchanging", lambda self, chunk, source: len(chunk), "signals"),
        (
            "attribute_step",
            measure_gradients.MeasureGradients,
            "_together",
            lambda self, query, leaves, weights: len(weights),
            "gradients of the measure",
        ),
    ],
)
def test_where_memory_runs_out_fewer_are_taken_at_a_time_and_the_result_is_the_same(
    verb, owner, name, size_of, part, most, monkeypatch, caplog
):
    recipe = transformer_recipe()
    call = activations if verb == "patch_signals" else patched
    expected = call(recipe, getattr(dy, verb))
    tried = failing_above(monkeypatch, owner, name, most, size_of)
    with caplog.at_level(logging.WARNING, "dynamics"):
        found = call(recipe, getattr(dy, verb))
    assert max(tried) > most
    for variable in expected.data_vars:
        np.testing.assert_allclose(found[variable], expected[variable], rtol=0, atol=1e-12)
    assert "OutOfMemoryError: CUDA out of memory" in paths(found)[part]
    assert sum("out of memory" in r.getMessage() for r in caplog.records) == 1


def test_memory_that_does_not_hold_one_model_is_an_error_with_the_contrasts_name(monkeypatch):
    failing_above(monkeypatch, Steps, "begin", 0, lambda self, many, space=None: len(many))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        patched(transformer_recipe())
    assert "This happened in pair 0." in caught.value.__notes__


def test_ctrl_c_is_never_taken_for_a_model_that_vmap_cannot_take(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "is_large", lambda parameters: True)
    for owner, name in ((Measuring, "_vmapped"), (per_example, "_together"), (measuring, "cache_prefix")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                patched(transformer_recipe(), dy.patch_updates)


def test_a_resumed_pass_that_fails_is_named(monkeypatch):
    def refused(*args):
        raise Fallback("not this one")

    monkeypatch.setattr(measuring, "is_large", lambda parameters: True)
    monkeypatch.setattr(measuring, "cache_prefix", refused)
    found = patched(transformer_recipe(), dy.patch_updates)
    assert paths(found)["forward passes"] == "whole, since not this one"


# --- measures ---------------------------------------------------------------------------------------------

NO_NUMBERS = {
    "None": (lambda m, b: None, "gave None"),
    "a list": (lambda m, b: [1.0], "gave a list"),
    "several axes": (lambda m, b: m(b.tokens)[:, -1], r"gave a tensor of shape \(\d+, 11\)"),
    "no rows": (lambda m, b: torch.zeros(0), r"gave a tensor of shape \(0,\)"),
    "NaN alone": (lambda m, b: m(b.tokens)[:, -1, 0] * float("nan"), "gave NaN for"),
}


@pytest.mark.parametrize("what", NO_NUMBERS)
@pytest.mark.parametrize("verb", ["patch_gradients", "patch_updates", "patch_activations", "attribute_step"])
def test_a_measure_that_gives_no_number_for_each_row_is_refused_by_name(verb, what):
    function, says = NO_NUMBERS[what]
    recipe = transformer_recipe()
    call = activations if verb == "patch_activations" else patched
    with pytest.raises(dy.measures.MeasureError, match=f"measure 'mine' {says}"):
        call(recipe, getattr(dy, verb), {"mine": function})
    of_logits = dy.measures.LogitMeasure("mine", "1", lambda z, b: function(lambda _: z[:, None], b))
    with pytest.raises(dy.measures.MeasureError, match=f"measure 'mine' {says}"):
        call(recipe, getattr(dy, verb), {"mine": of_logits})


@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_activations])
def test_nan_for_some_rows_is_a_number_like_any_other(verb):
    recipe = transformer_recipe()
    odd = dy.measures.LogitMeasure(
        "odd", "1", lambda z, b: z[:, 0].masked_fill(torch.arange(len(z)) % 2 == 1, float("nan"))
    )
    call = activations if verb is dy.patch_activations else patched
    assert bool(call(recipe, verb, odd)["patched"].isnull().all())
