"""The optimizer's step from given gradients: one by one, many at once, and torch's own."""

import copy

import pytest
import torch
from torch import Tensor, nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics.recipe import ByNorm
from tests.zoo.cases import first_quick
from tests.zoo.small_models import (
    CLIPS,
    LOOPED,
    OPTIMIZERS,
    Live,
    classifier,
    classifier_recipe,
    clip,
    draws,
    gap,
    points,
    same,
    trained,
)

Gradient = dict[str, Tensor | None]


def model_with_every_kind_of_parameter() -> nn.Module:
    """Trained, without axes, without a gradient, frozen."""
    model = classifier()
    model.unused = nn.Linear(2, 2).double()
    model.frozen = nn.Linear(2, 2).double().requires_grad_(False)
    return model


def gradients_of(model: nn.Module) -> list[Gradient]:
    """Drawn; zero; None for some; None for others; large enough to clip, and far too small to."""

    def drawn(seed: int, scale: float = 1.0, missing: str = "unused") -> Gradient:
        generator = draws(seed)
        return {
            name: None
            if name.startswith(("frozen", missing))
            else scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in model.named_parameters()
        }

    zero = {n: None if g is None else torch.zeros_like(g) for n, g in drawn(0).items()}
    half = drawn(6) | {"encoder.weight": torch.zeros(8, 5, dtype=torch.float64)}
    return [
        drawn(1),
        zero,
        drawn(2, missing="head"),
        drawn(3, 1e3),
        drawn(4, 1e-9),
        drawn(5, missing="head"),
        half,
    ]


def torch_step(recipe: dy.Recipe, live: Live, gradient: Gradient, fresh: bool) -> dict[str, Tensor]:
    """torch.optim's own step on copies of the live model and optimizer; nothing of the engine."""
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    if fresh:
        optimizer = recipe.optimizer(list(model.parameters()))
    for name, parameter in model.named_parameters():
        parameter.grad = None if gradient[name] is None else gradient[name].clone()
    clip(recipe, model)
    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("start", first_quick(["warm", "fresh", "without an optimizer"]))
@pytest.mark.parametrize("clipping", first_quick(CLIPS, 2))
@pytest.mark.parametrize("name", [*OPTIMIZERS, *LOOPED])
def test_steps_at_once_equal_steps_one_by_one_and_torchs_own(name, clipping, start):
    model = model_with_every_kind_of_parameter()
    optimizer = {**OPTIMIZERS, **LOOPED}[name]
    recipe = classifier_recipe(model=model, optimizer=optimizer, clip=CLIPS[clipping])
    live = trained(recipe, [points(seed) for seed in range(3)])
    checkpoint = {
        "fresh": live.last.with_fresh_optimizer(),
        "warm": live.last,
        "without an optimizer": Checkpoint.capture(live.model),
    }[start]
    many = gradients_of(model)
    at_once = dy.steps.steps_from(recipe, checkpoint, many)
    for gradient, together in zip(many, at_once, strict=True):
        expected = torch_step(recipe, live, gradient, fresh=start != "warm")
        alone = dy.steps.step_from(recipe, checkpoint, gradient)
        assert gap(alone, expected) < 1e-12
        assert gap(together, expected) < 1e-12
        if clipping == "unclipped":
            assert same(alone, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_does_not_depend_on_the_steps_taken_beside_it(name):
    recipe = classifier_recipe(model=model_with_every_kind_of_parameter(), optimizer=OPTIMIZERS[name])
    checkpoint = trained(recipe, [points(0), points(1)]).last
    many = gradients_of(recipe.model)
    for gradient, together in zip(many, dy.steps.steps_from(recipe, checkpoint, many), strict=True):
        assert same(together, dy.steps.steps_from(recipe, checkpoint, [gradient])[0])


def test_no_gradient_skips_a_parameter_where_a_zero_gradient_decays_it_and_lets_it_coast():
    recipe = classifier_recipe()
    live = trained(recipe, [points(seed) for seed in range(3)])
    zero = {name: torch.zeros_like(p) for name, p in live.last.parameters.items()}
    skipping = zero | {"head.weight": None}
    for checkpoint, coasts in ((live.last, True), (live.last.with_fresh_optimizer(), False)):
        before = checkpoint.parameters["head.weight"]
        coasted, skipped = (
            after["head.weight"] for after in dy.steps.steps_from(recipe, checkpoint, [zero, skipping])
        )
        assert torch.equal(skipped, before)
        decayed = before * (1 - 0.01 * 0.1)
        assert torch.equal(coasted, decayed) != coasts
        assert not torch.equal(coasted, before)


def test_stepping_leaves_the_checkpoint_and_the_gradients_as_they_were():
    recipe = classifier_recipe(optimizer=OPTIMIZERS["Adam amsgrad"], max_grad_norm=0.1)
    live = trained(recipe, [points(seed) for seed in range(3)])
    twin = Checkpoint.capture(live.model, live.optimizer, step=3)
    many = gradients_of(recipe.model)
    before = copy.deepcopy(many)
    for after in (
        *dy.steps.steps_from(recipe, live.last, many),
        dy.steps.step_from(recipe, live.last, many[0]),
    ):
        for tensor in after.values():
            assert not tensor.requires_grad
    assert live.last.equals(twin)
    for one, other in zip(many, before, strict=True):
        assert all(g is None if other[n] is None else torch.equal(g, other[n]) for n, g in one.items())


def test_no_gradients_give_no_steps():
    recipe = classifier_recipe()
    assert dy.steps.steps_from(recipe, Checkpoint.capture(recipe.model), []) == []


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum", "RMSprop"])
def test_an_optimizer_that_takes_only_what_requires_a_gradient_steps_the_same(name):
    model = classifier()
    model.encoder.requires_grad_(False)
    every = {**OPTIMIZERS, **LOOPED}[name]
    recipe = classifier_recipe(model=model, optimizer=lambda ps: every([p for p in ps if p.requires_grad]))
    live = trained(recipe, [points(seed) for seed in range(3)])
    gradient = dy.steps.gradient(recipe, live.last, points(3)).gradients
    expected = torch_step(recipe, live, gradient, fresh=False)
    assert gap(dy.steps.step_from(recipe, live.last, gradient), expected) < 1e-12
    assert gap(dy.steps.steps_from(recipe, live.last, [gradient])[0], expected) < 1e-12


@pytest.mark.parametrize("over", ["model", "optimizer"])
def test_an_optimizer_over_some_parameters_leaves_the_others_alone_and_the_recipe_says_if_clipping_counts_them(
    over,
):
    model = classifier()
    recipe = classifier_recipe(
        model=model,
        optimizer=lambda ps: torch.optim.AdamW([p for p in ps if p.ndim > 1], lr=0.01),
        clip=ByNorm(0.1, over=over),
    )
    live = trained(classifier_recipe(model=model), [points(0)])
    checkpoint = Checkpoint.capture(live.model)
    gradient = dy.steps.gradient(recipe, checkpoint, points(3)).gradients
    weights = {n: p.detach().clone().requires_grad_() for n, p in live.model.named_parameters() if p.ndim > 1}
    for name, weight in weights.items():
        weight.grad = gradient[name].clone()
    others = {n: nn.Parameter(p.detach()) for n, p in live.model.named_parameters() if p.ndim <= 1}
    for name, other in others.items():
        other.grad = gradient[name].clone()
    counted = [*weights.values(), *others.values()] if over == "model" else weights.values()
    nn.utils.clip_grad_norm_(counted, 0.1)
    torch.optim.AdamW(weights.values(), lr=0.01).step()
    for after in (
        dy.steps.step_from(recipe, checkpoint, gradient),
        *dy.steps.steps_from(recipe, checkpoint, [gradient]),
    ):
        assert gap({n: after[n] for n in weights}, weights) < 1e-12
        assert all(torch.equal(after[n], t) for n, t in checkpoint.parameters.items() if n not in weights)
