"""Every verb on any module: tied, frozen, skipped, sparse, recurrent, with several dtypes, buffers, dropout."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynamics as dy
from checkpoints import Checkpoint
from checkpoints.values import copied, differences
from dynamics import sites
from dynamics.recipe import RecipeError
from tests.zoo.any_models import (
    KINDS,
    N_WORDS,
    VERBS,
    Words,
    contrast_of,
    every_kind,
    every_usable,
    far,
    gradients_and_updates,
    made,
    sites_of,
    words,
)
from tests.zoo.small_models import (
    OPTIMIZERS,
    classifier,
    classifier_loss,
    classifier_recipe,
    margin,
    outcomes,
    points,
    same,
    trained,
)

pytestmark = pytest.mark.slow


@every_usable
def test_a_batch_exchanged_with_its_copy_has_no_effect_at_all(verb, kind):
    """So both runs see the same dropout masks, and nothing of the one reaches the other."""
    recipe, live = made(kind)
    patched = sites_of(verb, recipe.model)
    contrast = contrast_of(verb, kind, identical=True)
    result = VERBS[verb](recipe, live.last, [contrast], patched, KINDS[kind].measure)
    assert (result["source"] == result["base"]).all()
    assert (result["effect"] == 0).all()
    assert (result["untouched"] != result["base"]).all()


@every_usable
def test_a_verb_leaves_the_model_the_checkpoint_and_the_generators_as_they_were(verb, kind):
    recipe, live = made(kind)
    model = recipe.model
    next(iter(model.modules())).train(False)
    model.train()

    def seen() -> Any:
        return copied(
            {
                "tensors": dict([*model.named_parameters(), *model.named_buffers()]),
                "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
                "gradients": [p.grad for p in model.parameters()],
                "trained": [p.requires_grad for p in model.parameters()],
                "modes": [module.training for module in model.modules()],
                "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
                "checkpoint": [live.last.parameters, live.last.buffers],
                "generator": torch.get_rng_state(),
            }
        )

    before = seen()
    patched = sites_of(verb, model)[::3]
    result = VERBS[verb](recipe, live.last, [contrast_of(verb, kind)], patched, KINDS[kind].measure)
    assert differences(before, seen()) == []
    assert (result["effect"] != 0).any()


@every_kind
@pytest.mark.parametrize("verb", ["gradients", "window"])
def test_base_and_source_are_the_steps_training_takes(verb, kind):
    recipe, live = made(kind)
    recipe = replace(recipe, clip=None)
    contrast = contrast_of(verb, kind)
    found = outcomes(VERBS[verb], recipe, live.last, contrast, [sites.everything(recipe.model)])
    for name, batches in (("base", contrast.base), ("source", contrast.source)):
        expected = dy.steps.advance(
            recipe,
            live.last,
            5 if verb == "window" else 4,
            lambda step, batches=batches: batches[step - 3] if verb == "window" else batches,
        )
        assert far(found[name], expected.parameters | expected.buffers) < 1e-12
    assert same(found["everything"], found["source"])
    assert not same(found["base"], found["source"])


def test_base_and_source_see_the_same_dropout_mask_at_every_verb():
    """Dropout of one input channel at a time, told by which weights have a gradient."""
    masks: list[Tensor] = []

    class Watched(nn.Dropout):
        def forward(self, x):
            out = super().forward(x)
            if self.training:
                masks.append((out == 0).clone())
            return out

    model = classifier(dropout=0.5)
    model.drop = Watched(0.5)
    recipe = classifier_recipe(model=model)
    checkpoint = trained(recipe, [points(0)]).last
    pair = dy.Contrast(points(10), points(11), points(12))
    for verb, patched in (
        (dy.patch_gradients, sites.parameters(model)),
        (dy.patch_updates, sites.parameters(model)),
        (dy.patch_signals, sites.activations(model, "drop")),
        (dy.patch_factors, sites.matching(model, {"head": "head.*"})),
    ):
        masks.clear()
        verb(recipe, checkpoint, [pair], patched, margin)
        assert len(masks) >= 2
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    masks.clear()
    window = dy.Contrast([points(10), points(13)], [points(11), points(14)], points(12))
    dy.patch_window(recipe, checkpoint, [window], sites.parameters(model)[:2], margin)
    base, source, coasted, *patched = masks[:2], masks[2:4], masks[4:6], masks[6:10], masks[10:14]
    assert not torch.equal(base[0], base[1])
    for first, second in (base, source, coasted):
        assert torch.equal(first, base[0])
        assert torch.equal(second, base[1])
    for one in patched:
        assert all(torch.equal(mask, base[i // 2]) for i, mask in enumerate(one))


@gradients_and_updates
def test_a_tied_parameter_is_one_site_under_its_first_name_and_both_ends_move(verb):
    recipe, live = made("tied")
    assert "unembed.weight" not in dict(recipe.model.named_parameters())
    ends = []

    def measure(model, batch):
        ends.append(torch.equal(model.embed.weight, model.unembed.weight))
        return margin(model, batch)

    verb(recipe, live.last, [contrast_of("", "tied")], sites.parameters(recipe.model), measure)
    assert ends
    assert all(ends)


def test_tensors_keep_their_dtypes_through_every_verb():
    for kind in ("of two precisions", "partly bf16"):
        recipe, live = made(kind)
        for verb in ("gradients", "updates", "window"):
            found = outcomes(
                VERBS[verb], recipe, live.last, contrast_of(verb, kind), sites_of(verb, recipe.model)
            )
            for tensors in found.values():
                assert {n: t.dtype for n, t in tensors.items()} == {
                    n: t.dtype for n, t in recipe.model.named_parameters()
                }


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD maximize"])
def test_a_parameter_that_neither_batch_reaches_is_moved_by_no_step(optimizer):
    recipe, live = made("odd")
    recipe = replace(recipe, optimizer=OPTIMIZERS[optimizer])
    checkpoint = Checkpoint.capture(live.model)
    for verb in ("gradients", "updates", "window"):
        found = outcomes(
            VERBS[verb], recipe, checkpoint, contrast_of(verb, "odd"), sites_of(verb, recipe.model)
        )
        for label, tensors in found.items():
            assert torch.equal(tensors["named.unused"], checkpoint.parameters["named.unused"])
            assert torch.equal(tensors["table"], checkpoint.parameters["table"])
            assert torch.equal(tensors["named.gain"], checkpoint.parameters["named.gain"]) == (
                label == "untouched"
            )


def test_a_parameter_that_forward_writes_to_is_refused_by_name():
    """nn.Embedding(max_norm=) shortens the rows it looks up, in place: a step does not begin at the checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Words(nn.Identity()).double()
        model.embed = nn.Embedding(N_WORDS, 4, max_norm=0.5).double()
    recipe = dy.Recipe(model, classifier_loss, OPTIMIZERS["SGD"])
    pair = dy.Contrast(words(10), words(11), words(12))
    with pytest.raises(RecipeError, match=r"writes into embed\.weight"):
        dy.patch_gradients(recipe, None, [pair], sites.parameters(model), margin)
