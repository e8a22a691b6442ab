"""Windows of steps: one, many, impulses, beside the slow way."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import dynamics as dy
from dynamics import sites
from dynamics.sites import Site
from tests.oracles.windows_by_hand import (
    ALL,
    agree,
    along,
    counted,
    floats,
    normed,
    pieces,
    slow_window,
    some_optimizers,
    some_optimizers_and_clips,
    twin,
    warm_up,
    window,
)
from tests.zoo.small_models import (
    CLIPS,
    OPTIMIZERS,
    by_itself,
    gap,
    margin,
    outcomes,
    points,
    same,
    spread,
    tokens,
    trained,
    transformer_recipe,
)


@pytest.mark.slow
@some_optimizers_and_clips
def test_a_window_of_one_step_is_patch_gradients_bitwise(optimizer, clipping):
    """Warm, and fresh where the gradient is clipped by value."""
    recipe, live = normed(optimizer=ALL[optimizer], clip=CLIPS[clipping])
    checkpoint = live.last.with_fresh_optimizer() if clipping == "by value" else live.last
    pair = dy.Contrast(points(10), points(20, rows=5), points(30))
    patched = pieces(recipe.model)
    one = outcomes(dy.patch_gradients, recipe, checkpoint, pair, patched)
    window = dy.Contrast([pair.base], [pair.source], pair.probe)
    other = outcomes(dy.patch_window, recipe, checkpoint, window, patched)
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []
    assert not same(one["head"], one["base"])


@pytest.mark.slow
def test_a_window_of_one_step_is_patch_gradients_bitwise_on_a_transformer():
    recipe = transformer_recipe(max_grad_norm=0.1)
    checkpoint = trained(recipe, [tokens(seed) for seed in range(3)]).last
    whole = [*sites.heads(recipe.model), *sites.components(recipe.model)]
    patched = [*whole, *sites.at_positions(whole[:1], {"first": 0, "the rest": (1, 2, 3)})]
    pair = dy.Contrast(tokens(10), tokens(11), tokens(12))
    one = dy.patch_gradients(recipe, checkpoint, [pair], patched, dy.measures.correct_logit)
    window = dy.Contrast([pair.base], [pair.source], pair.probe)
    other = dy.patch_window(recipe, checkpoint, [window], patched, dy.measures.correct_logit)
    assert one.drop_attrs().identical(other.isel(step=0, drop=True).drop_attrs())
    assert (abs(one["effect"]) > 0).all()


def test_a_window_of_one_step_without_a_checkpoint_is_patch_gradients_bitwise():
    recipe, _ = normed()
    pair = dy.Contrast(points(10), points(20), points(30))
    window = dy.Contrast([pair.base], [pair.source], pair.probe)
    torch.manual_seed(5)
    one = dy.patch_gradients(recipe, None, [pair], pieces(recipe.model), by_itself(margin))
    torch.manual_seed(5)
    other = dy.patch_window(recipe, None, [window], pieces(recipe.model), by_itself(margin))
    assert one.drop_attrs().identical(other.isel(step=0, drop=True).drop_attrs())


@pytest.mark.slow
@some_optimizers_and_clips
def test_unpatched_windows_are_training_on_the_base_and_on_the_source_batches(optimizer, clipping):
    recipe, live = normed(optimizer=ALL[optimizer], clip=CLIPS[clipping])
    contrast = window(4)
    found = along(recipe, live.last, contrast, [sites.everything(recipe.model)], [1, 2, 3, 4])
    for name, batches in (("base", contrast.base), ("source", contrast.source)):
        for n, state in enumerate(found[name], start=1):
            after = dy.steps.advance(
                recipe, live.last, 3 + n, lambda step, batches=batches: batches[step - 3]
            )
            assert agree(recipe, state, after.parameters | after.buffers, n)
    before = live.last.parameters | live.last.buffers
    assert all(same(state, before) for state in found["untouched"])


@pytest.mark.slow
@some_optimizers_and_clips
def test_every_step_of_a_patched_window_is_the_training_loops(optimizer, clipping):
    recipe, live = normed(optimizer=ALL[optimizer], clip=CLIPS[clipping])
    contrast = window(3)
    patched = pieces(recipe.model)[:5]
    found = along(recipe, live.last, contrast, patched, [1, 2, 3])
    for site in patched:
        expected = slow_window(recipe, live, contrast, site)
        for n, (state, slow) in enumerate(zip(found[site.label], expected, strict=True), start=1):
            assert agree(recipe, state, slow, n), site.label


def test_random_numbers_go_on_as_the_base_batches_draw_them():
    """Batches of other sizes draw other amounts; the source's draws leave no trace."""
    recipe, live = normed(optimizer=OPTIMIZERS["SGD"], clip=None)
    contrast = window(3, rows=7, source_rows=4)
    site = Site("head", {"head.weight": ...})
    found = along(recipe, live.last, contrast, [site], [1, 2, 3])
    for state, expected in zip(found["head"], slow_window(recipe, live, contrast, site), strict=True):
        assert same(state, expected)
    moved = dy.steps.advance(recipe, live.last, 6, lambda step: contrast.source[step - 3])
    assert same(found["source"][-1], moved.parameters | moved.buffers)


@pytest.mark.slow
@some_optimizers
def test_a_window_patched_nowhere_is_the_base_window_and_everywhere_the_source_window_bitwise(optimizer):
    recipe, live = normed(optimizer=ALL[optimizer])
    found = along(recipe, live.last, window(4), pieces(recipe.model), [1, 2, 4])
    for n in range(3):
        assert same(found["nothing"][n], found["base"][n])
        assert same(found["everything"][n], found["source"][n])
        assert not same(found["base"][n], found["source"][n])


@pytest.mark.slow
def test_on_a_transformer_every_step_is_the_training_loops():
    recipe = transformer_recipe(max_grad_norm=0.3, scheduler=warm_up)
    live = trained(recipe, [tokens(seed) for seed in range(3)])
    contrast = dy.Contrast([tokens(i) for i in (10, 11, 12)], [tokens(i) for i in (13, 14, 15)], tokens(16))
    patched = [*sites.heads(recipe.model), *sites.components(recipe.model)[:3]]
    found = along(recipe, live.last, contrast, patched, [1, 3])
    for site in patched:
        first, _, third = slow_window(recipe, live, contrast, site)
        assert gap(floats(found[site.label][0]), floats(first)) < 1e-12
        assert gap(floats(found[site.label][1]), floats(third)) < 1e-11


@pytest.mark.slow
def test_a_site_at_all_positions_walks_like_the_site_itself():
    recipe = transformer_recipe(max_grad_norm=0.3)
    checkpoint = trained(recipe, [tokens(seed) for seed in range(3)]).last
    contrast = dy.Contrast([tokens(i) for i in (10, 11, 12)], [tokens(i) for i in (13, 14, 15)], tokens(16))
    whole = sites.matrices(recipe.model)[4:6]
    located = sites.at_positions(whole, {"all": (0, 1, 2, 3), "first": 0})
    found = along(recipe, checkpoint, contrast, [*whole, *located], [1, 3])
    for site in whole:
        for state, everywhere, somewhere in zip(
            *(found[f"{site.label}{at}"] for at in ("", " @ all", " @ first")), strict=True
        ):
            assert gap(floats(state), floats(everywhere)) < 1e-11
            assert gap(floats(state), floats(somewhere)) > 1e-6


def test_coasting_takes_every_step_with_a_zero_gradient():
    recipe, live = normed()
    contrast = window(3)
    found = along(recipe, live.last, contrast, [Site("head", {"head.weight": ...})], [1, 2, 3])
    model, optimizer, scheduler = twin(recipe, live)
    for state in found["coasted"]:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        scheduler.step()
        assert gap({n: state[n] for n, _ in model.named_parameters()}, dict(model.named_parameters())) < 1e-15


def test_the_gradient_is_taken_where_the_patched_run_stands():
    """Not along the base run's path: a quadratic, by hand."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    recipe = dy.Recipe(
        model, lambda m, pull: (m.weight - pull).square().sum() / 2, partial(torch.optim.SGD, lr=0.5)
    )
    contrast = dy.Contrast([0.0, 0.0, 4.0], [2.0, 8.0, 4.0])
    site = Site("weight", {"weight": ...})
    found = dy.patch_window(recipe, None, [contrast], [site], lambda m, _: m.weight.sum(), [1, 2, 3])
    assert found["base"].values[:, 0].tolist() == [0.5, 0.25, 2.125]
    assert found["patched"].values[:, 0, 0].tolist() == [1.5, 4.75, 4.375]
    assert found["untouched"].values[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert found["coasted"].values[:, 0].tolist() == [1.0, 1.0, 1.0]


def impulse(n=3):
    """Sequences whose later batches are the same objects."""
    later = [points(40 + i) for i in range(1, n)]
    return dy.Contrast([points(10), *later], [points(20), *later], points(30))


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD momentum", "RMSprop"])
def test_an_impulse_is_one_patched_step_and_ordinary_training_after_it(optimizer):
    recipe, live = normed(optimizer=ALL[optimizer], clip=None)
    contrast = impulse(4)
    patched = pieces(recipe.model)
    found = along(recipe, live.last, contrast, patched, [1, 2, 3, 4])
    first = dy.Contrast(contrast.base[0], contrast.source[0], contrast.probe)
    for site in patched:
        expected = slow_window(recipe, live, contrast, site)
        assert all(same(s, e) for s, e in zip(found[site.label], expected, strict=True))
    one = outcomes(dy.patch_gradients, recipe, live.last, first, patched)
    assert all(same(one[site.label], found[site.label][0]) for site in patched)


def test_momentum_spreads_an_impulse_over_the_steps_after_it_by_hand():
    """A loss linear in the weight: the gradients do not feel the path, so only momentum carries the impulse on."""
    model = nn.Linear(1, 1, bias=False).double()
    recipe = dy.Recipe(
        model, lambda m, slope: slope * m.weight.sum(), partial(torch.optim.SGD, lr=0.1, momentum=0.5)
    )
    later = [1.0, 2.0, 3.0]
    contrast = dy.Contrast([1.0, *later], [-1.0, *later])
    found = dy.patch_window(
        recipe, None, [contrast], [Site("w", {"weight": ...})], lambda m, _: m.weight.sum(), [1, 2, 3, 4]
    )
    response = [0.2 * sum(0.5**i for i in range(n)) for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(found["effect"].values[:, 0, 0], response, rtol=1e-14)


def test_a_batch_that_base_and_source_share_needs_one_gradient_a_step():
    recipe, live = normed()
    recipe, calls = counted(recipe)
    patched = pieces(recipe.model)
    shared, apart = impulse(4), impulse(4)
    apart = dy.Contrast(apart.base, copy.deepcopy(apart.source), apart.probe)
    numbers = {}
    for name, contrast in (("shared", shared), ("apart", apart)):
        for n_sites in (2, 3):
            calls.clear()
            dy.patch_window(recipe, live.last, [contrast], patched[:n_sites], margin)
            numbers[name, n_sites] = len(calls)
    assert numbers["shared", 3] - numbers["shared", 2] == 4 + 1
    assert numbers["apart", 3] - numbers["apart", 2] == 4 + 4


def test_a_shared_batch_gives_the_same_window_as_a_copy_of_it_bitwise():
    recipe, live = normed()
    patched = [pieces(recipe.model)[0], sites.everything(recipe.model)]
    contrast = impulse(4)
    apart = dy.Contrast(contrast.base, copy.deepcopy(contrast.source), contrast.probe)
    measures = {"margin": margin, "spread": spread}
    one, other = (
        dy.patch_window(recipe, live.last, [c], patched, measures, [1, 2, 4]) for c in (contrast, apart)
    )
    assert one.drop_attrs().identical(other.drop_attrs())
    assert (one["effect"].sel(site=["head", "everything"]) != 0).all()
