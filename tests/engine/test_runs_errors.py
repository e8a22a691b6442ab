"""Errors say what was found, what was expected, and what to do."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.recipe import ByNorm, RecipeError
from dynamics.sites import Site, SiteError
from dynamics.steps import NonFiniteGradient
from tests.zoo.small_models import (
    CLIPS,
    LOOPED,
    OPTIMIZERS,
    classifier,
    classifier_loss,
    classifier_recipe,
    margin,
    points,
    tied,
    trained,
    transformer,
)

every_verb = pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])
PAIR = dy.Contrast(points(10), points(11), points(12))


def patch(verb, recipe, patched, checkpoint=None, contrasts=(PAIR,)):
    return verb(recipe, checkpoint, contrasts, patched, margin)


# --- recipes ----------------------------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize("captured", [True, False])
def test_a_recipe_without_a_loss_or_an_optimizer_is_told_what_to_give(verb, captured):
    model = classifier()
    checkpoint = Checkpoint.capture(model) if captured else None
    with pytest.raises(
        RecipeError, match=r"takes a training step: give the recipe loss=\(model, batch\) -> scalar"
    ):
        patch(verb, dy.Recipe(model, optimizer=torch.optim.SGD), sites.parameters(model), checkpoint)
    with pytest.raises(
        RecipeError, match=r"give the recipe optimizer=parameters -> Optimizer, such as partial"
    ):
        patch(verb, dy.Recipe(model, loss=classifier_loss), sites.parameters(model), checkpoint)


def test_replay_without_a_loss_or_an_optimizer_says_the_same():
    model = classifier()
    checkpoint = Checkpoint.capture(model)
    for recipe in (dy.Recipe(model), dy.Recipe(model, loss=classifier_loss)):
        with pytest.raises(RecipeError, match="takes a training step"):
            dy.steps.replay(recipe, checkpoint, points(0))


def test_clipping_is_given_once():
    assert dy.Recipe(nn.Linear(1, 1), max_grad_norm=2.0).clip == ByNorm(2.0)
    with pytest.raises(
        RecipeError, match=r"clip= or max_grad_norm=, not both: max_grad_norm=x means clip=ByNorm"
    ):
        dy.Recipe(nn.Linear(1, 1), clip=CLIPS["by value"], max_grad_norm=2.0)


def test_a_recipe_with_another_model_keeps_its_clipping():
    recipe = classifier_recipe(max_grad_norm=2.0)
    assert replace(recipe, model=classifier(norm=True)).clip == ByNorm(2.0)


@every_verb
@pytest.mark.parametrize("other", ["fewer parameters", "more parameters", "other shapes", "another dtype"])
def test_a_checkpoint_of_another_model_is_refused(verb, other):
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(3, 3)}).double()
    others = {
        "fewer parameters": nn.ModuleDict({"a": nn.Linear(5, 3)}).double(),
        "more parameters": nn.ModuleDict(
            {"a": nn.Linear(5, 3), "b": nn.Linear(3, 3), "c": nn.Linear(1, 1)}
        ).double(),
        "other shapes": nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(3, 3, bias=False)}).double(),
        "another dtype": nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(3, 3)}),
    }

    def loss(model, batch):
        return model["b"](model["a"](batch[0].to(model["a"].weight.dtype))).square().mean()

    recipe = dy.Recipe(model, loss, classifier_recipe().optimizer)
    checkpoint = Checkpoint.capture(others[other], recipe.optimizer(others[other].parameters()))
    with pytest.raises(ValueError, match=r"model"):
        verb(recipe, checkpoint, [PAIR], sites.parameters(model), loss)


@pytest.mark.parametrize("takes_a_step", [dy.patch_gradients, dy.patch_updates, dy.steps.replay])
def test_an_optimizer_over_other_parameters_than_it_was_given_is_refused(takes_a_step):
    """A step is taken on a copy; this optimizer would move the user's own model."""
    model = classifier()
    recipe = classifier_recipe(model=model, optimizer=lambda _: torch.optim.SGD(model.parameters(), lr=1.0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = Checkpoint.capture(model)
    rest = (PAIR.base,) if takes_a_step is dy.steps.replay else ([PAIR], sites.parameters(model), margin)
    with pytest.raises(RecipeError, match="given"):
        takes_a_step(recipe, before, *rest)
    assert Checkpoint.capture(model).equals(before)


@pytest.mark.parametrize("takes_a_step", [dy.patch_gradients, dy.patch_updates, dy.steps.replay])
@pytest.mark.parametrize(
    ("recorded", "wanted"), [("AdamW", "SGD momentum"), ("SGD momentum", "AdamW"), ("AdamW", "RMSprop")]
)
def test_a_checkpoint_of_another_kind_of_optimizer_is_refused(takes_a_step, recorded, wanted):
    """Its groups lack this optimizer's settings, which would silently take their defaults."""
    kinds = {**OPTIMIZERS, **LOOPED}
    checkpoint = trained(
        classifier_recipe(optimizer=kinds[recorded]), [points(0)]
    ).last.with_fresh_optimizer()
    recipe = classifier_recipe(optimizer=kinds[wanted])
    rest = (
        (PAIR.base,) if takes_a_step is dy.steps.replay else ([PAIR], sites.parameters(recipe.model), margin)
    )
    with pytest.raises(ValueError, match="optimizer"):
        takes_a_step(recipe, checkpoint, *rest)


def one_cycle(optimizer):
    """A scheduler that keeps settings of its own in the optimizer's groups."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=8)


@every_verb
@pytest.mark.parametrize("lacks", ["a setting that torch added later", "what a scheduler adds"])
def test_groups_of_the_same_kind_of_optimizer_may_lack_a_setting(verb, lacks):
    live = trained(classifier_recipe(), [points(0), points(1)])
    recipe = classifier_recipe(scheduler=one_cycle if lacks == "what a scheduler adds" else None)
    expected = patch(verb, classifier_recipe(), sites.parameters(recipe.model), live.last)
    if lacks == "a setting that torch added later":
        for group in live.last.optimizer.groups:
            del group["decoupled_weight_decay"]
    found = patch(verb, recipe, sites.parameters(recipe.model), live.last)
    assert found.drop_attrs().identical(expected.drop_attrs())


# --- sites ------------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown parameter": (
        {"body.weight": ...},
        r"'mine' covers 'body\.weight', but the model has temperature, encoder\.weight",
    ),
    "nothing": ({}, "'mine' covers nothing"),
    "an index too high": (
        {"head.weight": (3,)},
        r"reads index 3 on axis 0 of 'head\.weight', which has 3 \(0-2\)",
    ),
    "an index too low": (
        {"head.weight": (0, -9)},
        r"reads index -9 on axis 1 of 'head\.weight', which has 8",
    ),
    "a slice too long": (
        {"head.weight": (slice(0, 4),)},
        r"slices axis 0 of 'head\.weight' to 4, which has 3",
    ),
    "a slice that begins outside": ({"head.weight": (slice(7, None),)}, r"axis 0 of 'head\.weight'.* 3"),
    "a slice of nothing": ({"head.weight": (slice(1, 1),)}, r"'mine' .*axis 0 of 'head\.weight'.* 3"),
    "too many axes": ({"head.bias": (0, 0)}, r"indexes 2 axes of 'head\.bias', which has shape \(3,\)"),
    "a mask of another shape": (
        {"head.bias": torch.ones(4, dtype=torch.bool)},
        r"masks 'head\.bias' with a torch\.bool tensor of shape \(4,\); it must be boolean and of shape \(3,\)",
    ),
    "a mask of floats": ({"head.bias": torch.ones(3)}, r"torch\.float32 tensor .* it must be boolean"),
    "a mask of integers": (
        {"head.bias": torch.tensor([1, 0, 1])},
        r"torch\.int64 tensor .* it must be boolean",
    ),
    "a bare integer": ({"head.weight": 1}, r"'mine' .*'head\.weight'"),
    "a bare slice": ({"head.weight": slice(0, 2)}, r"'mine' .*'head\.weight'"),
    "a list": ({"head.weight": [0, 2]}, r"'mine' .*'head\.weight'"),
}


@every_verb
@pytest.mark.parametrize("what", list(REFUSED))
def test_a_site_outside_the_model_is_refused_before_anything_is_computed(verb, what):
    covers, text = REFUSED[what]

    def never(model, batch):
        raise AssertionError("the loss was called")

    recipe = classifier_recipe(loss=never)
    with pytest.raises(SiteError, match=text):
        patch(verb, recipe, [*sites.parameters(recipe.model), Site("mine", covers)])


@every_verb
def test_labels_that_occur_twice_are_refused(verb):
    recipe = classifier_recipe()
    with pytest.raises(SiteError, match=r"labels head\.bias occur more than once"):
        patch(verb, recipe, [*sites.parameters(recipe.model), Site("head.bias", {"head.bias": ...})])


def test_a_label_that_matches_nothing_is_refused_and_the_names_are_listed():
    model = classifier()
    with pytest.raises(
        SiteError, match=r"'body': no parameter matches \['body\.\*'\].*temperature, encoder\.weight"
    ):
        sites.matching(model, {"head": "head.*", "body": "body.*"})
    with pytest.raises(SiteError, match="'head': no parameter matches"):
        sites.matching(model, {"head": "head.*"}, exclude="head.*")


def test_matching_includes_excludes_and_knows_the_layer():
    found = sites.matching(
        classifier(), {"weights": "*.weight", "two": ["head.*", "temp*"]}, exclude=["encoder.*"]
    )
    assert [(s.label, list(s.covers)) for s in found] == [
        ("weights", ["head.weight"]),
        ("two", ["temperature", "head.weight", "head.bias"]),
    ]
    in_one, in_both = sites.matching(transformer(), {"mlp 1": "blocks.1.mlp.*", "mlps": "blocks.*.mlp.*"})
    assert (in_one.coords["layer"], in_both.coords["layer"]) == (1, -1)


@pytest.mark.parametrize("level", sites.LEVELS)
def test_a_model_without_blocks_is_sent_to_other_constructors(level):
    with pytest.raises(
        SiteError, match=r"Classifier has no parameters named blocks\.0.*sites\.parameters\(model\)"
    ):
        sites.LEVELS[level](classifier())


def test_heads_that_are_not_on_an_axis_of_their_own_are_said_to_be():
    model = transformer()
    model.blocks[1].attn.W_Q = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(SiteError, match=r"no blocks\.1\.attn\.W_Q of shape \[n_heads, d_model, d_head\]"):
        sites.heads(model)


def test_the_second_name_of_a_tied_parameter_is_no_site():
    with pytest.raises(SiteError, match=r"covers 'unembed\.weight', but the model has embed\.weight"):
        sites.check([Site("unembed", {"unembed.weight": ...})], tied())


# --- gradients --------------------------------------------------------------------------------------------


def overflowing(where):
    """A loss whose value, or the gradient of one parameter, is not finite once an input is infinite."""

    def loss(model, batch):
        x, y = batch
        if x.isfinite().all():
            return classifier_loss(model, batch)
        finite = classifier_loss(model, (x.nan_to_num(posinf=0.0), y))
        if where == "loss":
            return finite * torch.inf
        return finite + (model.head.bias - model.head.bias.detach()).abs().sqrt().sum()

    return loss


@every_verb
@pytest.mark.parametrize("side", ["base", "source"])
@pytest.mark.parametrize(
    "named",
    [
        True,
        False,
    ],
)
def test_a_gradient_that_is_not_finite_names_the_contrast_the_parameter_and_the_step(verb, side, named):
    x, y = points(11)
    bad = replace(PAIR, **{side: (x / 0, y)}, coords={"example": "alias 7"} if named else {})
    name = "alias 7" if named else "contrast 1"
    recipe = classifier_recipe(loss=overflowing("gradient"))
    checkpoint = trained(classifier_recipe(), [points(0), points(1)]).last
    with pytest.raises(
        NonFiniteGradient, match=rf"gradient of head\.bias for the {side} batch of {name} at step 2"
    ):
        patch(verb, recipe, sites.parameters(recipe.model), checkpoint, [PAIR, bad])


@every_verb
def test_a_loss_that_is_not_finite_is_refused_too(verb):
    x, y = points(11)
    bad = replace(PAIR, source=(x / 0, y), coords={"example": "alias 7"})
    recipe = classifier_recipe(loss=overflowing("loss"))
    with pytest.raises(NonFiniteGradient, match=r"loss of the source batch of alias 7 at step 0 is inf"):
        patch(verb, recipe, sites.parameters(recipe.model), contrasts=[bad])


def test_a_checkpoint_from_mid_training_without_moments_has_to_say_that_its_optimizer_is_new():
    recipe = classifier_recipe()
    pair = dy.Contrast(points(1), points(2), points(3))
    bare = Checkpoint.capture(recipe.model, step=7)
    patched = [sites.everything(recipe.model)]
    for verb in (dy.patch_gradients, dy.patch_updates, dy.attribute_step):
        with pytest.raises(
            RecipeError, match=r"checkpoint 7 holds no optimizer state.*with_fresh_optimizer\(\)"
        ):
            verb(recipe, bare, [pair], patched, margin)
    found = dy.patch_gradients(recipe, bare.with_fresh_optimizer(), [pair], patched, margin)
    expected = dy.patch_gradients(recipe, None, [pair], patched, margin)
    for name in ("base", "source", "untouched", "coasted", "patched"):
        assert (found[name].values == expected[name].values).all()
    with pytest.raises(RecipeError, match="checkpoint 7 holds no optimizer state"):
        dy.steps.replay(recipe, bare, pair.base)
