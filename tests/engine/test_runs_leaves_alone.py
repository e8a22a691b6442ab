"""Nothing of the user's is changed: not by a verb, not by a step, not when something fails halfway."""

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint
from checkpoints.values import copied, differences
from dynamics import sites
from tests.zoo.small_models import (
    LOOPED,
    OPTIMIZERS,
    classifier,
    classifier_loss,
    classifier_recipe,
    margin,
    points,
    trained,
)

VERBS = {"patch_gradients": dy.patch_gradients, "patch_updates": dy.patch_updates}
STEPS = {
    "gradient": lambda recipe, checkpoint, pair: dy.steps.gradient(recipe, checkpoint, pair.base),
    "replay": lambda recipe, checkpoint, pair: dy.steps.replay(recipe, checkpoint, pair.base),
    "step_from": lambda recipe, checkpoint, _: dy.steps.step_from(
        recipe, checkpoint, dict(checkpoint.parameters)
    ),
    "steps_from": lambda recipe, checkpoint, _: dy.steps.steps_from(
        recipe, checkpoint, [dict(checkpoint.parameters)]
    ),
}


class Broken(Exception):
    """Raised by a loss or a measure of the user's."""


@dataclass
class Belongings:
    """A user's model in an unusual state, its optimizer, a checkpoint and a contrast, and what they were."""

    recipe: dy.Recipe
    optimizer: Any
    checkpoint: Checkpoint
    pair: dy.Contrast
    before: Any = field(init=False)

    def __post_init__(self) -> None:
        self.before = copied(self.seen())

    def seen(self) -> Any:
        """Everything that could have been changed, as a plain value."""
        model = self.recipe.model
        named = [*model.named_parameters(), *model.named_buffers()]
        version, words, gauss = random.getstate()
        legacy = np.random.get_state(legacy=False)  # noqa: NPY002
        return {
            "tensors": dict(named),
            "identities": [id(tensor) for _, tensor in named],
            "requires_grad": [tensor.requires_grad for _, tensor in named],
            "grad": {name: tensor.grad for name, tensor in named},
            "modes": {name: module.training for name, module in model.named_modules()},
            "hooks": [
                [list(module._forward_hooks), list(module._forward_pre_hooks)] for module in model.modules()
            ],
            "attributes": [sorted(vars(module)) for module in model.modules()],
            "optimizer": self.optimizer.state_dict(),
            "checkpoint": self.checkpoint._compared(),
            "batches": [*self.pair.base, *self.pair.source, *self.pair.probe],
            "torch": torch.get_rng_state(),
            "python": [version, *words, gauss],
            "numpy": [*legacy["state"]["key"].tolist(), legacy["state"]["pos"]],
            "grad mode": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "dtype": str(torch.get_default_dtype()),
        }

    def changes(self) -> list[str]:
        return differences(self.before, copied(self.seen()))


def draw_from_every_generator(model: nn.Module, batch: Any) -> torch.Tensor:
    noise = torch.randn(()).double() + random.random() + np.random.rand()  # noqa: NPY002
    return classifier_loss(model, batch) * noise.abs()


def belongings(optimizer: str = "AdamW", loss: Any = draw_from_every_generator) -> Belongings:
    model = classifier(norm=True, dropout=0.3)
    model.encoder.bias.requires_grad_(False)
    recipe = classifier_recipe(
        model=model, loss=loss, optimizer={**OPTIMIZERS, **LOOPED}[optimizer], max_grad_norm=0.1
    )
    live = trained(classifier_recipe(model=model, optimizer=recipe.optimizer), [points(0), points(1)])
    model.drop.eval()
    model.head.weight.grad = torch.ones(3, 8, dtype=torch.float64)
    model.encoder.register_forward_hook(lambda module, inputs, output: None)
    torch.manual_seed(3)
    return Belongings(recipe, live.optimizer, live.last, dy.Contrast(points(10), points(11), points(12)))


every_verb = pytest.mark.parametrize("verb", VERBS)
every_optimizer = pytest.mark.parametrize(
    "optimizer", ["AdamW", "Adam amsgrad", "SGD momentum", "RMSprop", "Adagrad"]
)


@every_verb
@every_optimizer
@pytest.mark.parametrize(
    "start",
    ["stored", *(pytest.param(one, marks=pytest.mark.slow) for one in ("fresh", "the model as it stands"))],
)
def test_a_verb_leaves_everything_as_it_was(verb, optimizer, start):
    mine = belongings(optimizer)
    checkpoint = {"stored": mine.checkpoint, "fresh": mine.checkpoint.with_fresh_optimizer()}.get(start)
    patched = [*sites.parameters(mine.recipe.model), sites.everything(mine.recipe.model)]
    result = VERBS[verb](
        mine.recipe, checkpoint, [mine.pair, mine.pair.reversed()], patched, {"margin": margin}
    )
    assert mine.changes() == []
    assert (result["source"] != result["base"]).all()


@pytest.mark.parametrize("step", STEPS)
@every_optimizer
def test_a_step_leaves_everything_as_it_was(step, optimizer):
    mine = belongings(optimizer)
    STEPS[step](mine.recipe, mine.checkpoint, mine.pair)
    assert mine.changes() == []


@every_verb
@pytest.mark.parametrize("call", range(2))
def test_a_loss_that_raises_leaves_everything_as_it_was(verb, call):
    calls = []

    def loss(model, batch):
        draw_from_every_generator(model, batch)
        calls.append(batch)
        if len(calls) > call:
            raise Broken
        return classifier_loss(model, batch)

    mine = belongings(loss=loss)
    with pytest.raises(Broken):
        VERBS[verb](mine.recipe, mine.checkpoint, [mine.pair], [sites.everything(mine.recipe.model)], margin)
    assert mine.changes() == []
    calls.clear()
    with pytest.raises(Broken):
        dy.steps.advance(mine.recipe, mine.checkpoint, 4, lambda step: mine.pair.base)
    assert mine.changes() == []


@every_verb
@pytest.mark.parametrize("call", [0, 1, 4])
def test_a_measure_that_raises_leaves_everything_as_it_was(verb, call):
    calls = []

    def measure(model, batch):
        assert not any(module.training for module in model.modules())
        calls.append(model(batch[0]))
        if len(calls) > call:
            raise Broken
        return margin(model, batch)

    mine = belongings()
    with pytest.raises(Broken):
        VERBS[verb](mine.recipe, mine.checkpoint, [mine.pair], [sites.everything(mine.recipe.model)], measure)
    assert mine.changes() == []


@every_verb
def test_the_loss_runs_in_the_models_own_modes_and_the_measure_in_eval_mode_without_gradients(verb):
    seen = {"loss": set(), "measure": set()}

    def modes(model):
        return tuple(module.training for module in model.modules()), torch.is_grad_enabled()

    def loss(model, batch):
        seen["loss"].add(modes(model))
        return classifier_loss(model, batch)

    def measure(model, batch):
        seen["measure"].add(modes(model))
        return margin(model, batch)

    mine = belongings(loss=loss)
    with torch.no_grad():
        VERBS[verb](mine.recipe, mine.checkpoint, [mine.pair], [sites.everything(mine.recipe.model)], measure)
    training = tuple(module.training for module in mine.recipe.model.modules())
    assert len(set(training)) == 2
    assert seen["loss"] == {(training, True)}
    assert seen["measure"] == {((False,) * len(training), False)}


@every_verb
def test_the_models_own_weights_do_not_matter_when_a_checkpoint_is_given(verb):
    mine = belongings()
    patched = sites.parameters(mine.recipe.model)
    one = VERBS[verb](mine.recipe, mine.checkpoint, [mine.pair], patched, margin)
    with torch.no_grad():
        for tensor in (*mine.recipe.model.parameters(), mine.recipe.model.norm.running_mean):
            tensor.fill_(torch.nan)
    other = VERBS[verb](mine.recipe, mine.checkpoint, [mine.pair], patched, margin)
    assert one.drop_attrs().identical(other.drop_attrs())


@every_verb
def test_the_same_call_gives_the_same_bits_wherever_the_callers_generators_stand(verb):
    mine = belongings()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        found.append(
            VERBS[verb](
                mine.recipe, mine.checkpoint, [mine.pair], sites.parameters(mine.recipe.model), margin
            )
        )
    assert found[0].drop_attrs().identical(found[1].drop_attrs())


@every_verb
@pytest.mark.parametrize("touches", ["buffer", "parameter"])
def test_a_measure_that_writes_to_the_model_changes_neither_checkpoint_nor_model_nor_the_next_cell(
    verb, touches
):
    """Such as a counter in forward, or an ablation in place."""
    found = []

    def measure(model, batch):
        tensor = model.norm.running_mean if touches == "buffer" else model.head.weight
        found.append(tensor.clone())
        tensor.add_(1.0)
        return margin(model, batch)

    mine = belongings()
    site = sites.Site("bias", {"head.bias": ...})
    VERBS[verb](mine.recipe, mine.checkpoint, [mine.pair], [site], measure)
    untouched, _, base, _, patched = found
    name = "norm.running_mean" if touches == "buffer" else "head.weight"
    assert mine.changes() == []
    assert torch.equal(
        untouched, mine.before["checkpoint"]["parameters" if touches == "parameter" else "buffers"][name]
    )
    assert torch.equal(patched, base) or (touches == "parameter" and verb == "patch_gradients")


@every_verb
def test_a_measure_that_draws_gives_back_the_generators_and_draws_the_same_in_every_cell(verb):
    mine = belongings()
    pair = dy.Contrast(mine.pair.base, mine.pair.base, mine.pair.probe)

    def noisy(model, batch):
        return margin(model, batch) + torch.randn(())

    result = VERBS[verb](mine.recipe, mine.checkpoint, [pair], sites.parameters(mine.recipe.model), noisy)
    assert mine.changes() == []
    assert (result["effect"] == 0).all()


def test_replay_gives_back_the_callers_setting_of_deterministic_algorithms():
    mine = belongings()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        dy.steps.replay(mine.recipe, mine.checkpoint, mine.pair.base)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_recipe_is_not_tied_to_one_model():
    """A copy of the model, or of the recipe, is as good as the original."""
    mine = belongings()
    twin = copy.deepcopy(mine.recipe.model)
    other = dy.Recipe(twin, mine.recipe.loss, mine.recipe.optimizer, clip=mine.recipe.clip)
    one, two = (
        dy.patch_gradients(recipe, mine.checkpoint, [mine.pair], sites.parameters(twin), margin)
        for recipe in (mine.recipe, other)
    )
    assert one.drop_attrs().identical(two.drop_attrs())
