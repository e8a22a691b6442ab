"""Logits, accuracies and predictions of two checkpoints, against loops in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.batch import Batch
from dynamics.comparison import compare_logits, compare_rows, score
from tests.zoo.comparison_models import logits, questions, softmax

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def by_loops(recipe, state, batch):
    """Each row's probabilities, logits of its target, whether it is right."""
    z = logits(recipe, state, batch)
    targets = batch.targets.numpy()
    return (
        np.stack([softmax(row) for row in z]),
        np.array([row[t] for row, t in zip(z, targets, strict=True)]),
        np.array([row.argmax() == t for row, t in zip(z, targets, strict=True)]),
        z.argmax(-1),
    )


def test_every_number_is_that_of_a_loop_over_rows(recipe, pair, sets):
    found = compare_logits(*pair, recipe, sets, {"set": ["a", "b"]})
    assert found["set"].values.tolist() == ["a", "b"]
    for i, batch in enumerate(sets.values()):
        (p, zp, right_p, said_p), (q, zq, right_q, said_q) = (by_loops(recipe, s, batch) for s in pair)
        targets = batch.targets.numpy()
        rows = np.arange(len(targets))
        kl = np.mean(
            [sum(a * np.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
        )
        here = found.isel(example=i)
        np.testing.assert_allclose(here["kl"], kl, **EXACT)
        np.testing.assert_allclose(here["changed"], np.mean(said_p != said_q), **EXACT)
        for side, probabilities, z, right in (("before", p, zp, right_p), ("after", q, zq, right_q)):
            np.testing.assert_allclose(here[f"accuracy_{side}"], right.mean(), **EXACT)
            np.testing.assert_allclose(here[f"correct_logit_{side}"], z.mean(), **EXACT)
            np.testing.assert_allclose(
                here[f"loss_{side}"], -np.log(probabilities[rows, targets]).mean(), **EXACT
            )
        assert int(here["rows"]) == len(batch)


def test_a_score_is_one_side_of_a_comparison(recipe, pair, sets):
    both = compare_logits(*pair, recipe, sets)
    for state, side in zip(pair, ("before", "after"), strict=True):
        alone = score(recipe, state, sets)
        for name in ("accuracy", "loss", "correct_logit"):
            np.testing.assert_array_equal(alone[name], both[f"{name}_{side}"])


def test_a_checkpoint_differs_from_itself_by_nothing(recipe, pair, sets):
    same = compare_logits(pair[0], pair[0], recipe, sets)
    assert (same["kl"] == 0).all()
    assert (same["changed"] == 0).all()
    assert (compare_logits(*pair, recipe, sets)["kl"] > 0).all()


def test_batches_of_several_lengths_are_answered_each_as_by_itself(recipe, pair):
    long, short = questions(4), questions(5)
    short = Batch(short.tokens[:, :3], short.target_pos.clamp(max=2), short.targets)
    together = compare_logits(*pair, recipe, {"long": long, "short": short, "again": long})
    assert together["example"].values.tolist() == ["long", "short", "again"]
    for name, batch in (("long", long), ("short", short), ("again", long)):
        alone = compare_logits(*pair, recipe, {name: batch})
        np.testing.assert_allclose(together["kl"].sel(example=name), alone["kl"][0], **EXACT)


def test_rows_tell_every_prediction(recipe, pair):
    batch = replace(questions(6), example_ids=torch.arange(7) // 2)
    found = compare_rows(*pair, recipe, batch)
    for state, side in zip(pair, ("before", "after"), strict=True):
        _, z, _, said = by_loops(recipe, state, batch)
        np.testing.assert_array_equal(found[f"prediction_{side}"], said)
        np.testing.assert_allclose(found[f"correct_logit_{side}"], z, **EXACT)
    np.testing.assert_array_equal(found["target"], batch.targets)
    np.testing.assert_array_equal(found["example_id"], [0, 0, 1, 1, 2, 2, 3])
    whole = compare_logits(*pair, recipe, {"all": batch})
    np.testing.assert_allclose(found["kl"].mean(), whole["kl"][0], **EXACT)
    assert found["row"].values[1] == "1: " + " ".join(map(str, batch.tokens[1].tolist()))


def test_random_numbers_are_left_alone_and_nothing_is_an_error(recipe, pair):
    before = torch.get_rng_state()
    compare_logits(*pair, recipe, {"x": questions(1)})
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="no batches"):
        compare_logits(*pair, recipe, {})


def test_compare_is_its_parts(recipe, pair, sets):
    model = recipe.model
    weights = dy.sites.matrices(model)
    like = sets["first"]
    outputs = dy.sites.activations(model, "blocks.*.hook_resid_post", ("layer", "pos"), like)
    patterns = dy.sites.activations(model, "*hook_pattern", ("layer", "head"), like)
    found = dy.compare(*pair, recipe, sets, weights, outputs=outputs, patterns=patterns)
    together = dy.comparison.compare_activations(
        *pair, recipe, dy.batch.concatenate(list(sets.values())), outputs
    )
    np.testing.assert_array_equal(found["activations"]["cka"], together["cka"])
    assert list(found) == ["weights", "logits", "activations", "patterns"]
    assert list(dy.compare(*pair, recipe, sets, weights)) == ["weights", "logits"]
