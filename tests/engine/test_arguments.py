"""Every verb checks what it is given at its door, in the toolkit's words."""

import pytest
import torch
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.sites import Site
from tests.zoo.small_models import classifier_recipe, margin, points, transformer_recipe

TRIPLE = points(10), points(11), points(12)
PAIR = dy.Contrast(*TRIPLE)
STEP_VERBS = {
    "patch_gradients": dy.patch_gradients,
    "patch_updates": dy.patch_updates,
    "patch_factors": dy.patch_factors,
    "patch_signals": dy.patch_signals,
    "patch_window": dy.patch_window,
    "attribute_step": dy.attribute_step,
}
ACTIVATION_VERBS = {
    "patch_activations": dy.patch_activations,
    "attribute_activations": dy.attribute_activations,
    "patch_paths": dy.patch_paths,
    "attribute_paths": dy.attribute_paths,
}
VERBS = STEP_VERBS | ACTIVATION_VERBS


def called(verb, **changes):
    recipe = classifier_recipe()
    given = {
        "recipe": recipe,
        "checkpoint": None,
        "contrasts": [PAIR],
        "sites": sites.parameters(recipe.model)[:1],
        "measure": margin,
    } | changes
    return verb(*given.values())


class NoTrajectory:
    """Anything else."""


WRONG = {
    "a model for a recipe": (
        {"recipe": nn.Linear(2, 2)},
        TypeError,
        r"was given a Linear; give .*Recipe\(model",
    ),
    "a step for a checkpoint": (
        {"checkpoint": 4010},
        TypeError,
        r"was given 4010; give run.at\(4010\), or .*reach",
    ),
    "a model for a checkpoint": (
        {"checkpoint": nn.Linear(2, 2)},
        TypeError,
        r"a Linear; give Checkpoint.capture",
    ),
    "another thing for a checkpoint": (
        {"checkpoint": NoTrajectory()},
        TypeError,
        "a NoTrajectory; give a Checkpoint",
    ),
    "one contrast": ({"contrasts": PAIR}, TypeError, "takes a list of contrasts and was given one Contrast"),
    "no contrast": ({"contrasts": [PAIR, 3]}, TypeError, "number 1 of those given is 3; expected a Contrast"),
    "no contrasts": ({"contrasts": []}, ValueError, "was given no contrasts"),
    "one site": ({"sites": Site("w", {"w": ...})}, TypeError, "takes a list of sites and was given one Site"),
    "labels for sites": (
        {"sites": ["encoder"]},
        TypeError,
        "number 0 of those given is a str; expected a Site",
    ),
    "a text for sites": ({"sites": "encoder"}, TypeError, "takes a list of sites and was given a str"),
    "no sites": ({"sites": []}, ValueError, "was given no sites"),
    "a name for a measure": ({"measure": "accuracy"}, TypeError, "a str as measure .*expected a function"),
    "no measures": ({"measure": {}}, ValueError, "was given no measures"),
    "labels that are one": (
        {"contrasts": [PAIR, dy.Contrast(*TRIPLE, coords={"example": "contrast 0"})]},
        ValueError,
        "contrasts share a label",
    ),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("verb", VERBS)
def test_an_argument_of_another_kind_is_refused_in_words(verb, what):
    changes, error, says = WRONG[what]
    with pytest.raises(error, match=says) as caught:
        called(VERBS[verb], **changes)
    assert verb in str(caught.value) or "share a label" in str(caught.value)


@pytest.mark.parametrize("verb", VERBS)
def test_a_trajectory_where_a_checkpoint_belongs_is_refused_with_one_of_its_steps(verb, tmp_path):
    recipe = classifier_recipe()
    with dy.TrajectoryWriter.create(tmp_path / "run", {}) as writer:
        writer.append(Checkpoint.capture(recipe.model, step=7))
    with pytest.raises(
        TypeError, match=r"was given a Trajectory; give one of its checkpoints, such as run.at\(7\)"
    ):
        called(VERBS[verb], checkpoint=dy.Trajectory.open(tmp_path / "run"))


@pytest.mark.parametrize("verb", STEP_VERBS)
def test_a_measure_of_the_logits_needs_a_probe_that_is_a_batch(verb):
    recipe = transformer_recipe()
    window = [points(1)] if verb == "patch_window" else points(1)
    for probe, error, says in (
        (None, ValueError, r"contrast 0 has none: give Contrast\(base, source, probe=batch\)"),
        ({"tokens": torch.zeros(1)}, TypeError, "the probe of contrast 0 is a dict. Give a dynamics.Batch"),
    ):
        with pytest.raises(error, match=says):
            called(
                STEP_VERBS[verb],
                recipe=recipe,
                contrasts=[dy.Contrast(window, window, probe)],
                sites=sites.parameters(recipe.model)[:1],
                measure=dy.measures.correct_logit,
            )


def test_an_error_of_the_users_own_is_raised_as_it_is_with_the_contrasts_name():
    class Mine(Exception):
        pass

    def failing(model, batch):
        raise Mine("of my own")

    for verb in (dy.patch_gradients, dy.patch_updates, dy.attribute_step):
        with pytest.raises(Mine, match="of my own") as caught:
            called(verb, contrasts=[dy.Contrast(*TRIPLE, coords={"example": "alias 7"})], measure=failing)
        assert "This happened in alias 7." in caught.value.__notes__
