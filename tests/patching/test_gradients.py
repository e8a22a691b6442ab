"""patch_gradients beside the seed's algorithm: copies, overwritten slices of .grad, torch's own functions."""

from functools import partial

import pytest
import torch

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from tests.oracles.seed_patching import backward, seed_patch
from tests.zoo.small_models import (
    LOOPED,
    OPTIMIZERS,
    Tied,
    classifier,
    classifier_loss,
    classifier_recipe,
    draws,
    margin,
    points,
    spread,
    tied,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)

LOGITS = {
    name: dy.measures.by_name(name) for name in ("correct_logit", "correct_log_prob", "logit_difference")
}
LEVELS = ("heads", "circuits", "matrices", "components", "up_to_layer", "layers")

fresh_and_stored = pytest.mark.parametrize("start", [pytest.param("fresh", marks=pytest.mark.slow), "stored"])


def assert_agrees(recipe, live, contrasts, patched, measures, start, tolerance, given=False):
    """At every contrast, site and measure, relative to the measure; the sites must differ among themselves."""
    checkpoint = live.last.with_fresh_optimizer() if start == "fresh" else live.last
    result = dy.patch_gradients(recipe, checkpoint, contrasts, patched, measures)
    for i, contrast in enumerate(contrasts):
        gradients = (
            tuple(
                dy.steps.gradient(recipe, checkpoint, b).gradients for b in (contrast.base, contrast.source)
            )
            if given
            else tuple(backward(recipe, live.model, b) for b in (contrast.base, contrast.source))
        )
        for site in patched:
            expected = seed_patch(recipe, live, contrast, site, measures, start == "fresh", gradients)
            for name, value in expected.items():
                found = result["patched"].isel(example=i).sel(site=site.label, measure=name).item()
                assert abs(found - value) < tolerance * max(1.0, abs(value)), (site.label, name)
    return result


@pytest.mark.parametrize(
    ("level", "start", "max_grad_norm"),
    [
        *((level, "stored", 0.1) for level in LEVELS[:3]),
        *(pytest.param(level, "stored", 0.1, marks=pytest.mark.slow) for level in LEVELS[3:]),
        *(pytest.param(level, "fresh", 1e6, marks=pytest.mark.slow) for level in LEVELS),
        pytest.param("heads", "fresh", 0.1, marks=pytest.mark.slow),
        pytest.param("heads", "stored", 1e6, marks=pytest.mark.slow),
    ],
)
def test_on_a_transformer_in_double_precision(level, start, max_grad_norm):
    recipe = transformer_recipe(max_grad_norm=max_grad_norm)
    live = trained(recipe, [tokens(seed) for seed in range(3)])
    pair = dy.Contrast(tokens(10), tokens(11), tokens(12))
    patched = sites.LEVELS[level](recipe.model)
    result = assert_agrees(recipe, live, [pair], patched, LOGITS, start, 1e-10)
    assert abs(result["effect"]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "start", "max_grad_norm"), [("heads", "stored", 0.1), ("matrices", "fresh", 1e6)]
)
def test_on_a_transformer_in_single_precision_given_the_same_gradients(level, start, max_grad_norm):
    recipe = transformer_recipe(model=transformer("float32"), max_grad_norm=max_grad_norm)
    live = trained(recipe, [tokens(seed) for seed in range(3)])
    pair = dy.Contrast(tokens(10), tokens(11), tokens(12))
    patched = sites.LEVELS[level](recipe.model)
    assert_agrees(recipe, live, [pair], patched, LOGITS, start, 1e-5, given=True)


def pieces(model):
    """Whole parameters, rows, blocks, a boolean mask, the parameter without axes, several at once."""
    mask = torch.rand(8, 5, generator=draws(0)) < 0.4
    return [
        *sites.parameters(model),
        *sites.matching(model, {"the encoder": "encoder.*", "all biases": ["*.bias"]}),
        Site("a unit", {"encoder.weight": (3,), "encoder.bias": (3,), "head.weight": (slice(None), 3)}),
        Site("a block", {"encoder.weight": (slice(2, 6), slice(1, 4))}),
        Site("a stride from the end", {"encoder.weight": (slice(None, None, 3), -1)}),
        Site("a mask", {"encoder.weight": mask, "head.bias": torch.tensor([True, False, True])}),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "start", "max_grad_norm"),
    [
        *(
            (optimizer, start, norm)
            for optimizer in [*OPTIMIZERS, *LOOPED]
            for start, norm in (("stored", 0.1), ("fresh", 1e6))
        ),
        ("AdamW", "fresh", 0.1),
        ("AdamW", "stored", 1e6),
    ],
)
def test_on_a_model_that_is_no_transformer_with_any_optimizer(optimizer, start, max_grad_norm):
    recipe = classifier_recipe(optimizer={**OPTIMIZERS, **LOOPED}[optimizer], max_grad_norm=max_grad_norm)
    live = trained(recipe, [points(seed) for seed in range(3)])
    pairs = [
        dy.Contrast(points(10), points(11), points(12)),
        dy.Contrast(points(13), points(14, rows=3), points(15)),
    ]
    measures = {"margin": margin, "spread": spread}
    assert_agrees(recipe, live, pairs, pieces(recipe.model), measures, start, 1e-10)


@fresh_and_stored
def test_without_clipping_at_all(start):
    recipe = classifier_recipe()
    live = trained(recipe, [points(seed) for seed in range(3)])
    pair = dy.Contrast(points(10), points(11), points(12))
    assert_agrees(recipe, live, [pair], pieces(recipe.model), {"margin": margin}, start, 1e-10)


@fresh_and_stored
def test_with_clipping_by_value(start):
    recipe = classifier_recipe(clip=dy.ByValue(0.02), optimizer=OPTIMIZERS["SGD momentum"])
    live = trained(recipe, [points(seed) for seed in range(3)])
    pair = dy.Contrast(points(10), points(11), points(12))
    assert_agrees(recipe, live, [pair], pieces(recipe.model), {"margin": margin}, start, 1e-10)


def test_on_a_classifier_in_single_precision_given_the_same_gradients():
    recipe = classifier_recipe(model=classifier(dtype=torch.float32), max_grad_norm=0.1)
    single = partial(points, dtype=torch.float32)
    live = trained(recipe, [single(seed) for seed in range(3)])
    pair = dy.Contrast(single(10), single(11), single(12))
    for start in ("fresh", "stored"):
        assert_agrees(recipe, live, [pair], pieces(recipe.model), {"margin": margin}, start, 1e-5, given=True)


def test_at_the_rate_that_a_scheduler_had_reached():
    warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: (step + 1) / 8)
    recipe = classifier_recipe(scheduler=warm_up)
    live = trained(recipe, [points(seed) for seed in range(3)])
    assert live.optimizer.param_groups[0]["lr"] == 0.005
    pair = dy.Contrast(points(10), points(11), points(12))
    assert_agrees(recipe, live, [pair], pieces(recipe.model), {"margin": margin}, "stored", 1e-10)


def tied_recipe():
    """A language model whose embedding is its unembedding; batches are tuples of tokens and targets."""
    return dy.Recipe(tied(), loss=classifier_loss, optimizer=OPTIMIZERS["AdamW"], max_grad_norm=0.1)


def words(seed):
    return torch.randint(11, (2, 8), generator=draws(seed)).unbind(0)


@fresh_and_stored
def test_on_a_model_with_tied_parameters(start):
    recipe = tied_recipe()
    live = trained(recipe, [words(seed) for seed in range(3)])
    assert isinstance(live.model, Tied)
    assert list(live.last.parameters) == ["embed.weight", "mix.weight", "mix.bias"]
    pair = dy.Contrast(words(10), words(11), words(12))
    patched = [*sites.parameters(recipe.model), Site("a word", {"embed.weight": (4,)})]
    result = assert_agrees(recipe, live, [pair], patched, {"margin": margin}, start, 1e-10)
    assert (abs(result["effect"]) > 1e-6).all()


def test_updates_of_tied_parameters_reach_the_embedding_and_the_unembedding():
    recipe = tied_recipe()
    live = trained(recipe, [words(seed) for seed in range(3)])
    pair = dy.Contrast(words(10), words(11), words(12))
    seen = []

    def both_ends(model, batch):
        seen.append(torch.equal(model.embed.weight, model.unembed.weight))
        return model.unembed.weight.sum()

    site = Site("embed", {"embed.weight": ...})
    result = dy.patch_updates(recipe, live.last, [pair], [site], both_ends)
    assert seen == [True] * 5
    assert result["effect"].item() == (result["source"] - result["base"]).item() != 0
    source = dy.steps.replay(recipe, live.last, pair.source).parameters["embed.weight"]
    assert result["patched"].item() == pytest.approx(source.sum().item(), abs=1e-12)
