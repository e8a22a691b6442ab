"""Nothing of a user's LightningModule changes, also when its methods fail."""

import copy
import gc
import random
import warnings
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from tests.zoo.small_models import margin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchmetrics import MeanMetric

import dynamics as dy
from checkpoints import Checkpoint
from checkpoints.values import copied, differences
from dynamics import sites
from dynamics.recipe import ByNorm
from tests.zoo.lightning_modules import BATCHES, PAIR, Rich


def seen(module):
    """All that could change in a module and around it, as a plain value."""
    named = [*module.named_parameters(), *module.named_buffers()]
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "tensors": dict(named),
        "identities": [id(tensor) for _, tensor in named],
        "requires_grad": [tensor.requires_grad for _, tensor in named],
        "grad": {name: tensor.grad for name, tensor in named},
        "modes": [part.training for part in module.modules()],
        "hooks": [[*part._forward_hooks, *part._forward_pre_hooks] for part in module.modules()],
        "attributes": [attributes(part) for part in module.modules()],
        "torch": torch.get_rng_state(),
        "python": [version, *words, gauss],
        "numpy": [*legacy["state"]["key"].tolist(), legacy["state"]["pos"]],
    }


def attributes(part):
    internal = vars(nn.Module())
    return {name: plain(value) for name, value in vars(part).items() if name not in internal}


def plain(value):
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor | str | int | float | None):
        return value
    return f"{type(value).__name__} at {id(value)}"


class Restless(Rich):
    """Draws from every generator, moves every attribute, and fails where it is told to."""

    fails = False

    def __init__(self):
        super().__init__()
        self.total = torch.zeros(())
        self.mean = MeanMetric()
        self.recent = {"losses": [torch.ones(2)], "names": {"a"}}
        self.encoder_hook = self.body.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.recent["losses"].append(output)

    def training_step(self, batch, batch_idx):
        returned = Rich.training_step(self, batch, batch_idx)
        noise = torch.randn(()).double() + random.random() + np.random.rand()  # noqa: NPY002
        self.total += 1
        self.mean.update(noise.detach())
        self.recent["names"].add("b")
        self.recent["more"] = returned
        self.recent = {}
        self.drop.eval()
        del self.seen
        if self.fails:
            raise Broken
        return {"loss": returned["loss"] * noise.abs() * self.total}

    def configure_optimizers(self):
        self.anneal = torch.rand(())
        random.random()
        self.log("never", 1.0)
        if self.fails:
            raise Broken
        return super().configure_optimizers()


class Broken(Exception):
    """Raised by a method of the user's."""


def restless():
    module = Restless()
    module.norm.eval()
    module.head.weight.grad = torch.ones_like(module.head.weight)
    module.accuracy.update(torch.eye(3), torch.arange(3))
    module.both.update(torch.eye(3), torch.arange(3))
    module.kept.update(torch.ones(2))
    return module


def use_everything(recipe):
    start = Checkpoint.capture(recipe.model)
    for verb in (dy.patch_gradients, dy.patch_updates):
        verb(recipe, None, [PAIR], sites.parameters(recipe.model), margin)
    dy.steps.replay(recipe, start, BATCHES[0])


def test_the_users_module_is_as_it_was():
    module = restless()
    before = copied(seen(module))
    recipe = dy.Recipe.from_lightning(module, clip=ByNorm(0.1))
    assert differences(before, copied(seen(module))) == []
    use_everything(recipe)
    assert differences(before, copied(seen(module))) == []


METHODS = {
    "training_step": lambda recipe, start: dy.steps.gradient(recipe, start, BATCHES[0]),
    "configure_optimizers": lambda recipe, start: dy.steps.replay(recipe, start, BATCHES[0]),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_users_module_is_as_it_was_when_its_method_fails(method):
    module = restless()
    before = copied(seen(module))
    recipe = dy.Recipe.from_lightning(module)
    recipe.model.fails = True
    start = Checkpoint.capture(recipe.model)
    with pytest.raises(Broken):
        METHODS[method](recipe, start)
    module.fails = True
    with pytest.raises(Broken):
        dy.Recipe.from_lightning(module)
    del module.fails
    assert differences(before, copied(seen(module))) == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_recipes_model_is_as_it_was_after_every_step(fails):
    """Metrics empty, lists no longer, nothing that holds a graph; so the second call sees what the first saw."""
    recipe = dy.Recipe.from_lightning(restless())
    recipe.model.fails = fails
    before = copied(seen(recipe.model))
    checkpoint = Checkpoint.capture(recipe.model)
    losses = set()
    for _ in range(3):
        with pytest.raises(Broken) if fails else nullcontext():
            losses.add(dy.steps.gradient(recipe, checkpoint, BATCHES[0]).loss.item())
        assert differences(before, copied(seen(recipe.model))) == []
    assert len(losses) == (not fails)
    copy.deepcopy(recipe.model)


def test_attributes_that_name_a_buffer_or_a_tensor_with_a_gradient_keep_naming_it():
    module = Rich()
    module.mean, module.extra = module.norm.running_mean, torch.ones(3, requires_grad=True)
    model = dy.Recipe.from_lightning(module).model
    extra = model.extra
    dy.Recipe.from_lightning(module).loss(model, BATCHES[0])
    assert model.mean is model.norm.running_mean
    assert model.mean.any()
    assert model.extra is extra


@pytest.mark.slow
def test_a_step_leaves_no_activation_behind():
    recipe = dy.Recipe.from_lightning(restless())
    outputs = []
    recipe.model.drop.register_forward_hook(lambda module, i, output: outputs.append(weakref.ref(output)))
    dy.steps.gradient(recipe, Checkpoint.capture(recipe.model), BATCHES[0])
    gc.collect()
    assert [output() for output in outputs] == [None]


def test_hooks_of_others_on_the_recipes_model_keep_what_they_saw():
    """A step runs on the very modules of recipe.model, so that a hook on them can record."""
    recipe = dy.Recipe.from_lightning(Rich())
    outputs = []
    handle = recipe.model.body.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    dy.steps.gradient(recipe, Checkpoint.capture(recipe.model), BATCHES[0])
    handle.remove()
    assert len(outputs) == 1
