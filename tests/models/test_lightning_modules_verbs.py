"""The verbs on a LightningModule are those of the seed's algorithm."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.recipe import ByNorm
from tests.oracles.seed_patching import seed_patch
from tests.zoo.lightning_modules import (
    BATCHES,
    PAIR,
    ByModuleType,
    FreezesLate,
    HoldsItsGroups,
    Recurrent,
    Rich,
    Tied,
    recorded,
)
from tests.zoo.small_models import Live, margin


def loss_by_hand(model, batch):
    """What Rich.training_step returns, without its bookkeeping."""
    x, y = batch
    return F.cross_entropy(model(x), y) + 0.01 * (model.head.weight**2).sum()


class Unnormed(Rich):
    def __init__(self):
        super().__init__(dropout=0.0)
        self.norm = nn.Identity()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A module after real training with clipping, beside its optimizer, and the checkpoint of that moment."""
    module = Unnormed()
    run = recorded(tmp_path_factory.mktemp("trained") / "run", module, gradient_clip_val=0.1)
    return Live(module, module.trainer.optimizers[0], None, [run.at(4)])


def last_state_cleared(module):
    module.last_loss = None
    module.outputs["train"].clear()
    return module


@pytest.mark.parametrize("start", ["stored", "fresh"])
def test_patched_gradients_equal_the_seeds_algorithm(trained, start):
    last_state_cleared(trained.model)
    recipe = dy.Recipe.from_lightning(trained.model, clip=ByNorm(0.1))
    patched = [*sites.parameters(recipe.model), sites.Site("row", {"head.weight": (slice(0, 1),)})]
    checkpoint, live = trained.last, trained
    if start == "fresh":
        checkpoint, live = checkpoint.with_fresh_optimizer(), copy.deepcopy(trained)
        live.optimizer.state.clear()
    result = dy.patch_gradients(recipe, checkpoint, [PAIR], patched, {"margin": margin})
    oracle = dy.Recipe(live.model, loss_by_hand, clip=ByNorm(0.1))
    for site in patched:
        expected = seed_patch(oracle, live, PAIR, site, {"margin": margin})["margin"]
        found = result["patched"].sel(site=site.label, measure="margin").item()
        assert abs(found - expected) < 1e-10 * max(1.0, abs(expected)), site.label
    assert abs(result["effect"]).min() > 1e-8


def test_patched_updates_are_selections_between_two_real_steps(trained):
    last_state_cleared(trained.model)
    recipe = dy.Recipe.from_lightning(trained.model, clip=ByNorm(0.1))
    patched = sites.parameters(recipe.model)
    result = dy.patch_updates(recipe, trained.last, [PAIR], patched, margin)
    oracle = dy.Recipe(trained.model, loss_by_hand, clip=ByNorm(0.1))
    for name, batch in (("base", PAIR.base), ("source", PAIR.source)):
        same = dy.Contrast(batch, batch, PAIR.probe)
        expected = seed_patch(oracle, trained, same, patched[0], {"margin": margin})["margin"]
        assert abs(result[name].item() - expected) < 1e-10
    after = {
        name: dy.steps.replay(recipe, trained.last, batch).parameters
        for name, batch in (("base", PAIR.base), ("source", PAIR.source))
    }
    for site in patched:
        model = copy.deepcopy(trained.model).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(after["source" if name in site.covers else "base"][name])
            expected = margin(model, PAIR.probe).mean().item()
        assert abs(result["patched"].sel(site=site.label).item() - expected) < 1e-10


@pytest.mark.parametrize("kind", [Rich, ByModuleType, FreezesLate, HoldsItsGroups, Recurrent, Tied])
def test_steps_taken_at_once_equal_steps_taken_one_by_one(kind):
    recipe = dy.Recipe.from_lightning(kind(), clip=ByNorm(0.1))
    optimizer = recipe.build_optimizer(recipe.model.parameters())
    start = Checkpoint.capture(recipe.model, optimizer, recipe.build_scheduler(optimizer))
    start = dy.steps.replay(recipe, start, BATCHES[0])
    many = [dy.steps.gradient(recipe, start, batch).gradients for batch in BATCHES[1:]]
    for taken, gradients in zip(dy.steps.steps_from(recipe, start, many), many, strict=True):
        alone = dy.steps.step_from(recipe, start, gradients)
        moved = [n for n in alone if not torch.equal(alone[n], start.parameters[n])]
        held = {n for group in start.optimizer.groups for n in group["params"]}
        assert moved == [n for n, g in gradients.items() if g is not None and n in held]
        assert all((taken[n] - alone[n]).abs().max() < 1e-14 for n in alone)
