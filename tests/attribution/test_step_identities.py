"""The identities that attributions of a step obey; numbered as in MATHS, section 5."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from tests.zoo.small_models import (
    OPTIMIZERS,
    classifier,
    classifier_recipe,
    draws,
    margin,
    points,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)

pytestmark = pytest.mark.slow

BATCHES = [points(seed) for seed in range(3)]
PAIR = dy.Contrast(points(10), points(11), points(12))


@pytest.fixture(scope="module")
def at_a_transformer():
    recipe = transformer_recipe()
    return recipe, trained(recipe, [tokens(seed) for seed in range(3)]).last


QUESTION = dy.Contrast(tokens(10), tokens(11), tokens(12))
methods = pytest.mark.parametrize("method", ["first_order", "integrated"])
both_states = pytest.mark.parametrize("fresh", [False, True], ids=["stored", "fresh"])


@pytest.mark.parametrize("level", ["matrices", "components"])
@both_states
def test_over_a_partition_integrated_attributions_add_up_to_the_effect_within_the_residual(
    level, fresh, at_a_transformer
):
    """Identity 9."""
    recipe, checkpoint = at_a_transformer
    checkpoint = checkpoint.with_fresh_optimizer() if fresh else checkpoint
    pairs = [QUESTION, dy.Contrast(tokens(13), tokens(14), tokens(15))]
    partition = sites.LEVELS[level](recipe.model)
    found = dy.attribute_step(recipe, checkpoint, pairs, partition, dy.measures.correct_logit, tolerance=1e-9)
    gap = found["source"] - found["base"]
    total = found["attribution"].sum("site")
    assert abs(gap).min() > 1e-4
    np.testing.assert_allclose(total - gap, found["residual"], rtol=0, atol=1e-15)
    assert (abs(found["residual"]) <= 1e-8 * abs(found["attribution"]).sum("site")).all()
    first = dy.attribute_step(recipe, checkpoint, pairs, partition, dy.measures.correct_logit, "first_order")
    assert (abs(first["residual"]) > 1e-6).all()
    np.testing.assert_allclose(first["attribution"].sum("site") - gap, first["residual"], rtol=0, atol=1e-15)


@methods
def test_over_a_tensors_slices_attributions_add_up_to_the_tensors(method, at_a_transformer):
    """Identity 9."""
    recipe, checkpoint = at_a_transformer
    name = "blocks.1.attn.W_V"
    mask = torch.rand(recipe.model.get_parameter(name).shape, generator=draws(1)) < 0.3
    slices = {
        "first axis": [(0,), (1,)],
        "second axis": [(slice(None), i) for i in range(8)],
        "pieces": [(slice(None), slice(0, 5)), (slice(None), torch.tensor([5, 7])), (slice(None), 6)],
        "masks": [mask, ~mask],
        "whole": [(), (slice(None), slice(0, 8))],
    }
    patched = [Site("tensor", {name: ...})]
    patched += [Site(f"{kind} {i}", {name: s}) for kind, group in slices.items() for i, s in enumerate(group)]
    found = dy.attribute_step(recipe, checkpoint, [QUESTION], patched, dy.measures.correct_logit, method)[
        "attribution"
    ].isel(example=0)
    tensor = found.sel(site="tensor").item()
    assert abs(tensor) > 1e-6
    for kind in slices:
        parts = found.values[[label.startswith(kind) for label in found["site"].values]]
        expected = [tensor, tensor] if kind == "whole" else [tensor]
        assert parts.sum() == pytest.approx(sum(expected), abs=1e-12 * abs(tensor) + 1e-15)


@methods
@both_states
def test_between_two_equal_steps_there_is_exactly_nothing_to_attribute(method, fresh, at_a_transformer):
    """Identity 3."""
    recipe, checkpoint = at_a_transformer
    checkpoint = checkpoint.with_fresh_optimizer() if fresh else checkpoint
    same = dy.Contrast(tokens(10), tokens(10), tokens(12))
    found = dy.attribute_step(
        recipe, checkpoint, [same], sites.matrices(recipe.model), dy.measures.correct_logit, method
    )
    assert (found["attribution"] == 0).all()
    assert (found["residual"] == 0).all()
    assert found["nodes"].item() == (1 if method == "first_order" else 8)


@both_states
def test_reversing_a_contrast_negates_integrated_attributions_and_not_first_order_ones(
    fresh, at_a_transformer
):
    """Identity 3."""
    recipe, checkpoint = at_a_transformer
    checkpoint = checkpoint.with_fresh_optimizer() if fresh else checkpoint
    patched = sites.matrices(recipe.model)
    pairs = [QUESTION, QUESTION.reversed()]

    def there_and_back(method):
        found = [
            dy.attribute_step(recipe, checkpoint, [pair], patched, dy.measures.correct_logit, method)
            for pair in pairs
        ]
        return [result["attribution"].values[0] for result in found]

    there, back = there_and_back("integrated")
    np.testing.assert_allclose(there, -back, rtol=0, atol=1e-12 * abs(there).max())
    there, back = there_and_back("first_order")
    assert abs(there + back).max() > 0.01 * abs(there).max()


@methods
@both_states
def test_nothing_is_attributed_to_the_key_bias(method, fresh, at_a_transformer):
    """Identity 11: it shifts all scores of a query alike."""
    recipe, checkpoint = at_a_transformer
    checkpoint = checkpoint.with_fresh_optimizer() if fresh else checkpoint
    patched = [
        Site(f"{n} {layer}", {f"blocks.{layer}.attn.{n}": ...}) for n in ("b_K", "b_Q") for layer in (0, 1)
    ]
    found = abs(
        dy.attribute_step(recipe, checkpoint, [QUESTION], patched, dy.measures.correct_logit, method)[
            "attribution"
        ]
    )
    assert found[0, :2].max() < 1e-15
    assert found[0, 2:].min() > 1e-8


@both_states
def test_finite_differences_of_the_measure_agree(fresh, at_a_transformer):
    """Identity 12: a millionth of the update on the site, to either side of the base step."""
    recipe, checkpoint = at_a_transformer
    checkpoint = checkpoint.with_fresh_optimizer() if fresh else checkpoint
    patched = sites.matrices(recipe.model)
    found = dy.attribute_step(
        recipe, checkpoint, [QUESTION], patched, dy.measures.correct_logit, "first_order"
    )
    gradients = [dy.steps.gradient(recipe, checkpoint, b).gradients for b in (QUESTION.base, QUESTION.source)]
    base, source = dy.steps.steps_from(recipe, checkpoint, gradients)
    model = copy.deepcopy(recipe.model).eval()
    for site, value in zip(patched, found["attribution"].values[0], strict=True):
        sides = []
        for epsilon in (1e-4, -1e-4):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(base[name])
                    if name in site.covers:
                        index = site.covers[name]
                        parameter[index] += epsilon * (source[name] - base[name])[index]
                sides.append(dy.measures.correct_logit(model, QUESTION.probe).mean().item())
        slope = (sides[0] - sides[1]) / 2e-4
        assert value == pytest.approx(slope, rel=1e-6, abs=1e-10)


@methods
def test_where_measure_and_model_are_linear_an_attribution_is_the_effect_of_the_exchange(method):
    recipe = classifier_recipe(model=torch.nn.Linear(5, 3).double())
    checkpoint = trained(recipe, BATCHES).last
    patched = [*sites.parameters(recipe.model), Site("a row", {"weight": (1,)})]

    def first_logit(model, batch):
        return model(batch[0])[:, 0] - 2 * model(batch[0])[:, 1]

    exchanged = dy.patch_updates(recipe, checkpoint, [PAIR], patched, first_logit)
    found = dy.attribute_step(recipe, checkpoint, [PAIR], patched, first_logit, method)
    np.testing.assert_allclose(found["attribution"], exchanged["effect"], rtol=0, atol=1e-14)
    assert abs(found["residual"]).item() < 1e-14
    assert (abs(exchanged["effect"]) > 1e-4).all()


@both_states
def test_ranks_are_those_of_the_exchange_or_integrated_of_the_mean_of_both_directions(
    fresh, at_a_transformer
):
    recipe, checkpoint = at_a_transformer
    checkpoint = checkpoint.with_fresh_optimizer() if fresh else checkpoint
    arguments = sites.matrices(recipe.model), dy.measures.correct_logit
    there, back = (
        dy.patch_updates(recipe, checkpoint, [pair], *arguments)["effect"].values[0]
        for pair in (QUESTION, QUESTION.reversed())
    )
    first, whole = (
        dy.attribute_step(recipe, checkpoint, [QUESTION], *arguments, method)["attribution"].values[0]
        for method in ("first_order", "integrated")
    )
    assert spearmanr(first, there).statistic > 0.97
    assert spearmanr(whole, (there - back) / 2).statistic > 0.97
    for found, exact in ((first, there), (whole, (there - back) / 2)):
        assert (np.sign(found) == np.sign(exact))[abs(exact) > 1e-6].mean() > 0.95


def test_kinks_take_more_nodes_and_no_more_than_allowed():
    recipe = transformer_recipe(model=transformer(activation="relu"), optimizer=OPTIMIZERS["Adam"])
    checkpoint = trained(recipe, [tokens(seed) for seed in range(3)]).last.with_fresh_optimizer()
    measure = {"logit": dy.measures.correct_logit, "log prob": dy.measures.correct_log_prob}

    def found(patched, tolerance, max_nodes):
        return dy.attribute_step(
            recipe, checkpoint, [QUESTION], patched, measure, tolerance=tolerance, max_nodes=max_nodes
        )

    matrices, tensors = sites.matrices(recipe.model), sites.parameters(recipe.model)
    assert (found(matrices, 0.0, 3)["nodes"] == 3).all()
    assert (found(matrices, 0.0, 20)["nodes"] == 16).all()
    assert (found(matrices, np.inf, 64)["nodes"] == 8).all()
    result = found(tensors, 2e-3, 256)
    assert set(result["nodes"].values.ravel().tolist()) <= {8 * 2**n for n in range(6)}
    assert result["nodes"].max() > 8
    assert (abs(result["residual"]) <= 2e-3 * abs(result["attribution"]).sum("site")).all()
    np.testing.assert_array_equal(result["residual"], found(matrices, 2e-3, 256)["residual"])


def test_batch_statistics_of_the_source_run_are_left_in_the_residual():
    recipe = classifier_recipe(model=classifier(norm=True))
    checkpoint = trained(recipe, BATCHES).last
    everything = sites.everything(recipe.model)
    found = dy.attribute_step(recipe, checkpoint, [PAIR], [everything], margin, tolerance=1e-9)
    buffers = Site("buffers", dict.fromkeys(dict(recipe.model.named_buffers()), ...))
    without = dy.patch_updates(recipe, checkpoint, [PAIR.reversed()], [buffers], margin)
    parameters_alone = without["patched"].item() - found["base"].item()
    assert found["attribution"].item() == pytest.approx(parameters_alone, abs=1e-9)
    of_buffers = (found["source"] - without["patched"].values[0]).item()
    assert abs(of_buffers) > 1e-4
    assert found["residual"].item() == pytest.approx(-of_buffers, abs=1e-9)
    assert found["nodes"].item() == 8  # the tolerance does not wait for what no node can give
    nothing = dy.attribute_step(recipe, checkpoint, [PAIR], [buffers], margin)
    assert nothing["attribution"].item() == 0
