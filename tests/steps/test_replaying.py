"""Replaying recorded steps gives what training gave, bit for bit."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import dynamics as dy
from checkpoints import Checkpoint, Trajectory, TrajectoryWriter
from tests.zoo.small_models import (
    CLIPS,
    LOOPED,
    OPTIMIZERS,
    classifier,
    classifier_recipe,
    points,
    tokens,
    trained,
    transformer_recipe,
)

SCHEDULERS = {
    "constant": None,
    "warm-up": partial(LambdaLR, lr_lambda=lambda step: min(1.0, (step + 1) / 4)),
    "cosine": partial(CosineAnnealingLR, T_max=5),
    "one cycle": partial(OneCycleLR, max_lr=0.05, total_steps=8),
}
BATCHES = [points(seed) for seed in range(4)]


def assert_same_bits(replayed: Checkpoint, recorded: Checkpoint) -> None:
    assert replayed.step == recorded.step
    for mine, theirs in ((replayed.parameters, recorded.parameters), (replayed.buffers, recorded.buffers)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert replayed.differences(recorded) == []
    assert replayed.rng_differences(recorded) == []


def assert_every_step_replays(recipe: dy.Recipe) -> None:
    """Dropout, batch statistics, moments, counts, learning rates and generators included."""
    recorded = trained(recipe, BATCHES).checkpoints
    for batch, before, after in zip(BATCHES, recorded[:-1], recorded[1:], strict=True):
        assert_same_bits(dy.steps.replay(recipe, before, batch), after)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *LOOPED])
def test_replay_of_an_unpatched_step_equals_the_next_checkpoint_bitwise(name):
    model = classifier(norm=True, dropout=0.3)
    optimizer = {**OPTIMIZERS, **LOOPED}[name]
    assert_every_step_replays(classifier_recipe(model=model, optimizer=optimizer, max_grad_norm=0.1))


@pytest.mark.parametrize("clip", CLIPS)
def test_replay_clips_as_training_did(clip):
    assert_every_step_replays(classifier_recipe(clip=CLIPS[clip]))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW in two groups", "SGD momentum"])
def test_replay_steps_the_scheduler_as_training_did(scheduler, optimizer):
    recipe = classifier_recipe(optimizer=OPTIMIZERS[optimizer], scheduler=SCHEDULERS[scheduler])
    assert_every_step_replays(recipe)


def test_replay_in_single_precision_is_bitwise_too():
    recipe = transformer_recipe(model=None)
    recipe.model.float()
    batches = [tokens(seed) for seed in range(3)]
    recorded = trained(recipe, batches).checkpoints
    assert_same_bits(dy.steps.replay(recipe, recorded[2], batches[2]), recorded[3])


def test_replay_takes_dropout_from_the_checkpoint_and_not_from_the_caller():
    recipe = classifier_recipe(model=classifier(dropout=0.5))
    before = trained(recipe, BATCHES).checkpoints[2]
    torch.manual_seed(1)
    one = dy.steps.replay(recipe, before, BATCHES[2])
    torch.manual_seed(2)
    assert_same_bits(dy.steps.replay(recipe, before, BATCHES[2]), one)


def test_replay_of_a_model_with_frozen_and_unused_parameters_equals_training_bitwise():
    model = classifier()
    model.encoder.requires_grad_(False)
    model.unused = nn.Linear(2, 2).double()
    assert_every_step_replays(classifier_recipe(model=model, max_grad_norm=0.1))


def test_replay_from_a_checkpoint_without_an_optimizer_begins_a_new_one():
    recipe = classifier_recipe(scheduler=SCHEDULERS["warm-up"])
    recorded = trained(recipe, BATCHES).checkpoints
    bare = Checkpoint.capture(recipe.model)
    replayed = dy.steps.replay(recipe, bare, BATCHES[0])
    assert replayed.differences(recorded[1]) == []


def test_several_steps_at_once_equal_training_straight_through():
    recipe = classifier_recipe(model=classifier(norm=True, dropout=0.3), scheduler=SCHEDULERS["one cycle"])
    recorded = trained(recipe, BATCHES).checkpoints
    for start in range(5):
        for stop in range(start, 5):
            assert_same_bits(
                dy.steps.advance(recipe, recorded[start], stop, BATCHES.__getitem__), recorded[stop]
            )


def test_any_step_between_two_stored_checkpoints_is_reached_as_training_went_through_it(tmp_path):
    recipe = classifier_recipe(model=classifier(dropout=0.3), scheduler=SCHEDULERS["cosine"])
    batches = [points(seed) for seed in range(7)]
    recorded = trained(recipe, batches).checkpoints
    with TrajectoryWriter.create(tmp_path, {}) as writer:
        for step in (0, 3, 6):
            writer.append(recorded[step])
    run = Trajectory.open(tmp_path)
    for step in range(8):
        assert_same_bits(dy.steps.reach(recipe, run, step, batches.__getitem__), recorded[step])


def test_reaching_a_step_takes_only_the_batches_after_the_nearest_stored_step(tmp_path):
    recipe = classifier_recipe()
    recorded = trained(recipe, BATCHES).checkpoints
    with TrajectoryWriter.create(tmp_path, {}) as writer:
        writer.append(recorded[0])
        writer.append(recorded[2])
    asked = []

    def batch_of(step):
        asked.append(step)
        return BATCHES[step]

    dy.steps.reach(recipe, Trajectory.open(tmp_path), 4, batch_of)
    assert asked == [2, 3]


def test_replaying_backwards_is_refused():
    recipe = classifier_recipe()
    last = trained(recipe, BATCHES).last
    with pytest.raises(ValueError, match="step 3 lies before checkpoint 4; replaying only goes forward"):
        dy.steps.advance(recipe, last, 3, BATCHES.__getitem__)
