"""Parameters that a batch does not reach, frozen ones, masks, and buffers that a model writes anew."""

import copy

import pytest
import torch
from torch import Tensor, nn

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from tests.zoo.small_models import (
    OPTIMIZERS,
    classifier,
    classifier_recipe,
    draws,
    gap,
    margin,
    outcomes,
    points,
    same,
    trained,
)

every_verb = pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])


class Routed(nn.Module):
    """Batches go through one of two layers; the other has no gradient at all."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, route: str) -> Tensor:
        return getattr(self, route)(x)


def routed_loss(model, batch):
    (x, y), route = batch
    return nn.functional.cross_entropy(model(x, route), y)


def routed_measure(model, batch):
    (x, _), _ = batch
    return (model(x, "left") * model(x, "right")).sum()


@pytest.fixture(params=["AdamW", "SGD momentum"])
def routed(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Routed().double()
    recipe = dy.Recipe(model, routed_loss, OPTIMIZERS[request.param], max_grad_norm=0.1)
    live = trained(recipe, [(points(0), "left"), (points(1), "right"), (points(2), "left")])
    return recipe, live, dy.Contrast((points(10), "left"), (points(11), "right"), (points(12), "left"))


def stepped(recipe, live, gradient):
    """torch's own step of the live model with a gradient written into .grad."""
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    for name, parameter in model.named_parameters():
        parameter.grad = gradient.get(name)
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip.max_norm)
    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_whole_parameter_without_a_gradient_on_one_side_is_skipped_or_stepped_as_on_that_side(routed):
    recipe, live, pair = routed
    base, source = (dy.steps.gradient(recipe, live.last, b).gradients for b in (pair.base, pair.source))
    assert base["right.weight"] is None
    assert source["left.weight"] is None
    patched = sites.parameters(recipe.model)
    found = outcomes(dy.patch_gradients, recipe, live.last, pair, [*patched, sites.everything(recipe.model)])
    for site in patched:
        (name,) = site.covers
        mixed = {n: g if n != name else source[n] for n, g in base.items()}
        expected = stepped(recipe, live, {n: None if g is None else g.clone() for n, g in mixed.items()})
        assert gap(found[name], expected) < 1e-12
        if name.startswith("left"):
            assert torch.equal(found[name][name], live.last.parameters[name])
    assert same(found["everything"], found["source"])


@pytest.mark.parametrize("index", [(1,), torch.arange(15).reshape(3, 5) % 2 == 0])
def test_part_of_a_parameter_without_a_gradient_on_one_side_counts_as_zero_there(routed, index):
    recipe, live, pair = routed
    base, source = (dy.steps.gradient(recipe, live.last, b).gradients for b in (pair.base, pair.source))
    patched = [Site(side, {f"{side}.weight": index}) for side in ("left", "right")]
    found = outcomes(dy.patch_gradients, recipe, live.last, pair, patched)
    left = base["left.weight"].clone()
    left[index] = 0.0
    right = torch.zeros(3, 5, dtype=torch.float64)
    right[index] = source["right.weight"][index]
    for name, g in (("left", left), ("right", right)):
        expected = stepped(
            recipe, live, {n: g if n == f"{name}.weight" else t for n, t in copy.deepcopy(base).items()}
        )
        assert gap(found[name], expected) < 1e-12


def test_updates_of_a_skipped_parameter_are_exchanged_by_value(routed):
    recipe, live, pair = routed
    index = (slice(0, 2), 3)
    patched = [Site(side, {f"{side}.weight": index}) for side in ("left", "right")]
    found = outcomes(dy.patch_updates, recipe, live.last, pair, patched)
    for side in ("left", "right"):
        name = f"{side}.weight"
        expected = found["base"][name].clone()
        expected[index] = found["source"][name][index]
        assert torch.equal(found[side][name], expected)
        assert not torch.equal(expected, found["base"][name])
    assert torch.equal(found["base"]["right.weight"], live.last.parameters["right.weight"])


def test_coasting_moves_only_what_the_base_step_would_have_moved(routed):
    recipe, live, pair = routed
    found = outcomes(dy.patch_gradients, recipe, live.last, pair, sites.parameters(recipe.model))
    zero = {n: torch.zeros_like(p) for n, p in live.last.parameters.items() if n.startswith("left")}
    assert gap(found["coasted"], stepped(recipe, live, zero)) < 1e-15
    assert torch.equal(found["coasted"]["right.weight"], live.last.parameters["right.weight"])


@every_verb
def test_a_frozen_parameter_is_a_site_without_effect(verb):
    model = classifier()
    model.encoder.requires_grad_(False)
    recipe = classifier_recipe(model=model, max_grad_norm=0.1)
    checkpoint = trained(recipe, [points(0), points(1)]).last
    pair = dy.Contrast(points(10), points(11), points(12))
    patched = [
        Site("all", {"encoder.weight": ...}),
        Site("row", {"encoder.weight": (2,)}),
        Site("head", {"head.bias": ...}),
    ]
    found = outcomes(verb, recipe, checkpoint, pair, patched)
    assert same(found["all"], found["base"])
    assert same(found["row"], found["base"])
    assert not same(found["head"], found["base"])
    assert torch.equal(found["base"]["encoder.weight"], checkpoint.parameters["encoder.weight"])


@every_verb
def test_a_mask_exchanges_exactly_what_the_same_slices_do(verb):
    recipe = classifier_recipe(max_grad_norm=0.1)
    checkpoint = trained(recipe, [points(0), points(1)]).last
    pair = dy.Contrast(points(10), points(11), points(12))
    index = (slice(2, 6), slice(None, None, 2))
    mask = torch.zeros(8, 5, dtype=torch.bool)
    mask[index] = True
    same_place = [Site("slices", {"encoder.weight": index}), Site("mask", {"encoder.weight": mask})]
    found = outcomes(verb, recipe, checkpoint, pair, same_place)
    assert same(found["slices"], found["mask"])
    whole = [
        Site("dots", {"encoder.weight": ...}),
        Site("no axis", {"encoder.weight": ()}),
        Site("ones", {"encoder.weight": mask | True}),
    ]
    found = outcomes(verb, recipe, checkpoint, pair, whole)
    assert same(found["dots"], found["no axis"])
    assert same(found["dots"], found["ones"])


@every_verb
def test_scattered_masks_select_element_by_element(verb):
    recipe = classifier_recipe()
    checkpoint = trained(recipe, [points(0), points(1)]).last
    pair = dy.Contrast(points(10), points(11), points(12))
    masks = {n: torch.rand(p.shape, generator=draws(1)) < 0.5 for n, p in recipe.model.named_parameters()}
    found = outcomes(verb, recipe, checkpoint, pair, [Site("scattered", masks)])
    for name, mask in masks.items():
        expected = torch.where(mask, found["source"][name], found["base"][name])
        assert torch.equal(found["scattered"][name], expected)  # unclipped and elementwise: both verbs agree


class Counting(nn.Module):
    """A buffer that forward replaces by a new tensor, as running averages often are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.register_buffer("average", torch.zeros(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return self.head(x - self.average)


@every_verb
def test_a_buffer_that_is_assigned_anew_moves_as_in_replay(verb):
    recipe = classifier_recipe(model=Counting().double())
    checkpoint = trained(recipe, [points(0), points(1)]).last
    pair = dy.Contrast(points(10), points(11), points(12))
    everything = sites.everything(recipe.model)
    found = outcomes(verb, recipe, checkpoint, pair, [everything])
    for name, batch in (("base", pair.base), ("source", pair.source)):
        after = dy.steps.replay(recipe, checkpoint, batch)
        assert gap(found[name], after.parameters | after.buffers) < 1e-12
    assert same(found["everything"], found["source"])
    assert verb(recipe, checkpoint, [pair], [everything], margin)["effect"].item() != 0
    assert float(recipe.model.average.abs().max()) == 0
