"""patch_window beside an ordinary training loop that overwrites .grad at a site before every step."""

import copy
import random
from functools import partial
from types import EllipsisType

import numpy as np
import pytest
import torch
from engine_models import (
    CLIPS,
    LOOPED,
    OPTIMIZERS,
    classifier,
    classifier_loss,
    classifier_recipe,
    clip,
    draws,
    gap,
    margin,
    outcomes,
    points,
    same,
    spread,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)
from test_engine_leaves_alone import Broken, belongings, draw_from_every_generator
from torch import nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.recipe import ByNorm, RecipeError
from dynamics.sites import Site
from dynamics.steps import NonFiniteGradient

ALL = {**OPTIMIZERS, **LOOPED}
SOME = ("AdamW", "AdamW in two groups", "Adam amsgrad", "SGD momentum", "SGD", "RMSprop", "NAdam")
REFERENCES = ("untouched", "base", "source", "coasted")

warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: (step + 1) / 8)
some_optimizers_and_clips = pytest.mark.parametrize(
    ("optimizer", "clipping"),
    [
        *((name, "by norm") for name in SOME),
        *((n, c) for n in ("AdamW", "RMSprop") for c in CLIPS if c != "by norm"),
    ],
)
some_optimizers = pytest.mark.parametrize("optimizer", SOME)


def window(n=3, rows=7, source_rows=7):
    """A contrast of two sequences of batches, none of which they share."""
    return dy.Contrast(
        [points(10 + i, rows) for i in range(n)],
        [points(20 + i, source_rows) for i in range(n)],
        points(30),
        {"example": "first"},
    )


def normed(**changes):
    """A classifier with batch statistics and dropout after three steps of training with a scheduler."""
    model = changes.pop("model", None) or classifier(norm=True, dropout=0.3)
    recipe = classifier_recipe(model=model, **{"clip": CLIPS["by norm"], "scheduler": warm_up, **changes})
    return recipe, trained(recipe, [points(seed) for seed in range(3)], seed=4)


def pieces(model):
    """Whole parameters, a unit, a mask, statistics, what is covered by nothing and by everything."""
    scattered = torch.rand(8, 5, generator=draws(0)) < 0.4
    empty = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    return [
        Site("head", {"head.weight": ..., "head.bias": ...}),
        Site("temperature", {"temperature": ...}),
        Site("a unit", {"encoder.weight": (3,), "encoder.bias": (3,), "head.weight": (slice(None), 3)}),
        Site("a mask", {"encoder.weight": scattered}),
        Site("statistics", {"norm.running_mean": ..., "norm.running_var": (slice(0, 4),)}),
        Site("nothing", empty),
        sites.everything(model),
    ]


def along(recipe, checkpoint, contrast, patched, after):
    """All tensors of the model that each cell was measured on: label -> one dict for each step measured."""
    seen = []

    def record(model, _):
        tensors = (*model.named_parameters(), *model.named_buffers())
        seen.append({name: tensor.detach().clone() for name, tensor in tensors})
        return torch.tensor(float(len(seen) - 1))

    found = dy.patch_window(recipe, checkpoint, [contrast], patched, record, after)
    rows = {name: found[name].isel(example=0) for name in REFERENCES}
    rows |= {s.label: found["patched"].isel(example=0).sel(site=s.label) for s in patched}
    return {label: [seen[int(place)] for place in row.values] for label, row in rows.items()}


def twin(recipe, live):
    """Copies of the live model, optimizer and scheduler."""
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    if not recipe.scheduler:
        return model, optimizer, None
    scheduler = recipe.scheduler(optimizer)
    scheduler.load_state_dict(live.scheduler.state_dict())
    for ours, theirs in zip(optimizer.param_groups, live.optimizer.param_groups, strict=True):
        ours["lr"] = theirs["lr"]
    return model, optimizer, scheduler


def slow_window(recipe, live, contrast, site):
    """An ordinary training loop: both backward passes, .grad overwritten at the site, torch's clipping."""
    model, optimizer, scheduler = twin(recipe, live)
    states = []
    with live.last.random_state():
        for base, source in zip(contrast.base, contrast.source, strict=True):
            before = copy.deepcopy(dict(model.named_buffers()))
            generators = torch.get_rng_state()
            model.zero_grad()
            recipe.loss(model, source).backward()
            theirs = {name: p.grad for name, p in model.named_parameters()}
            moved = copy.deepcopy(dict(model.named_buffers()))
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            torch.set_rng_state(generators)
            model.zero_grad()
            recipe.loss(model, base).backward()
            for name, index in site.covers.items():
                if name in moved:
                    model.get_buffer(name)[index] = moved[name][index]
                elif isinstance(index, EllipsisType):
                    model.get_parameter(name).grad = theirs[name]
                else:
                    model.get_parameter(name).grad[index] = theirs[name][index]
            clip(recipe, model)
            optimizer.step()
            if scheduler:
                scheduler.step()
            states.append(copy.deepcopy(dict([*model.named_parameters(), *model.named_buffers()])))
    return states


def floats(state):
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def agree(recipe, one, other, n=1):
    """Bitwise, except where torch's clipping adds its norm up in another order; that noise grows by the step."""
    return gap(one, other) < 1e-12 * n if isinstance(recipe.clip, ByNorm) else same(one, other)


# --- one step ---------------------------------------------------------------------------------------------


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
    one = dy.patch_gradients(recipe, None, [pair], pieces(recipe.model), margin)
    torch.manual_seed(5)
    other = dy.patch_window(recipe, None, [window], pieces(recipe.model), margin)
    assert one.drop_attrs().identical(other.isel(step=0, drop=True).drop_attrs())


# --- whole windows ----------------------------------------------------------------------------------------


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


@some_optimizers
def test_a_window_patched_nowhere_is_the_base_window_and_everywhere_the_source_window_bitwise(optimizer):
    recipe, live = normed(optimizer=ALL[optimizer])
    found = along(recipe, live.last, window(4), pieces(recipe.model), [1, 2, 4])
    for n in range(3):
        assert same(found["nothing"][n], found["base"][n])
        assert same(found["everything"][n], found["source"][n])
        assert not same(found["base"][n], found["source"][n])


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


# --- impulses ---------------------------------------------------------------------------------------------


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


def counted(recipe):
    """The recipe with a loss that keeps the batches it was called with."""
    calls = []

    def loss(model, batch):
        calls.append(batch)
        return classifier_loss(model, batch)

    return dy.Recipe(recipe.model, loss, recipe.optimizer, recipe.scheduler, recipe.clip), calls


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


# --- contrasts that share their batches ---------------------------------------------------------------------


def as_given(verb, n):
    """Contrasts of one verb that share base and source and are probed on different points."""
    contrast = window(2) if verb is dy.patch_window else dy.Contrast(points(10), points(20))
    return [dy.Contrast(contrast.base, contrast.source, points(30 + i), {"alias": i}) for i in range(n)]


@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates, dy.patch_window])
def test_contrasts_with_the_same_batches_are_run_once_and_each_is_measured_on_its_own_probe(verb):
    recipe, live = normed()
    recipe, calls = counted(recipe)
    patched = pieces(recipe.model)[:3]
    given = as_given(verb, 4)
    other = dy.Contrast(points(50), points(60))
    if verb is dy.patch_window:
        other = dy.Contrast([other.base, points(51)], [other.source, points(61)])
    mixed = [
        given[0],
        dy.Contrast(given[0].base, other.source, points(70)),
        dy.Contrast(other.base, given[0].source, points(70)),
        *given[1:],
    ]
    numbers = []
    for contrasts in (given[:1], given, mixed):
        calls.clear()
        together = verb(recipe, live.last, contrasts, patched, {"margin": margin, "spread": spread})
        numbers.append(len(calls))
    assert numbers == [numbers[0], numbers[0], 3 * numbers[0]]
    apart = [verb(recipe, live.last, [c], patched, {"margin": margin, "spread": spread}) for c in mixed]
    for i, alone in enumerate(apart):
        for name in ("patched", "effect", *REFERENCES):
            np.testing.assert_array_equal(together[name].isel(example=[i]).values, alone[name].values)
    assert len({float(v) for v in together["base"].isel(measure=0).values.flatten()}) == 6


@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_window])
def test_a_measure_that_writes_to_the_model_does_not_reach_the_next_probe_of_the_same_batches(verb):
    recipe, live = normed()

    def shifted(model, batch):
        found = margin(model, batch)
        model.head.bias.add_(torch.tensor([1.0, 0.0, 0.0]))
        model.norm.running_mean.add_(1.0)
        return found

    given = as_given(verb, 3)
    one, other = (
        verb(recipe, live.last, given, pieces(recipe.model), measure) for measure in (shifted, margin)
    )
    assert one.drop_attrs().drop_vars("measure", errors="ignore").equals(other.drop_attrs())


# --- what is measured, when -------------------------------------------------------------------------------


def test_the_steps_measured_do_not_depend_on_the_others_and_the_end_is_the_default():
    recipe, live = normed()
    patched, contrast = pieces(recipe.model)[:3], window(4)
    run = partial(dy.patch_window, recipe, live.last, [contrast], patched)
    every = run(margin, [1, 2, 3, 4])
    assert every["step"].values.tolist() == [4, 5, 6, 7]
    for after in ([2], (1, 3), range(2, 5)):
        some = run(margin, after)
        assert some["step"].values.tolist() == [3 + n for n in after]
        assert some.drop_attrs().identical(every.sel(step=some["step"]).drop_attrs())
    end = run(margin)
    assert end["step"].values.tolist() == [7]
    assert end.drop_attrs().identical(every.isel(step=[3]).drop_attrs())


def test_every_variable_has_the_dim_step_and_effect_is_patched_less_base_at_each():
    recipe, live = normed()
    contrasts = [window(3), dy.Contrast(*[[points(i) for i in (50, 51, 52)] for _ in "bs"], points(53))]
    result = dy.patch_window(
        recipe, live.last, contrasts, pieces(recipe.model), {"a": margin, "b": spread}, [1, 3]
    )
    assert result["patched"].dims == result["effect"].dims == ("step", "measure", "example", "site")
    assert all(result[name].dims == ("step", "measure", "example") for name in REFERENCES)
    assert result["example"].values.tolist() == ["first", "contrast 1"]
    np.testing.assert_array_equal(result["effect"], result["patched"] - result["base"])
    assert (result["effect"].isel(example=1) == 0).all()
    assert (result["untouched"].isel(step=0) == result["untouched"].isel(step=1)).all()
    assert (result["base"].isel(step=0) != result["base"].isel(step=1)).all()


def test_what_a_measure_draws_or_writes_between_the_steps_does_not_reach_the_next():
    recipe, live = normed()
    patched, contrast = pieces(recipe.model), window(3)

    def meddling(model, batch):
        found = margin(model, batch)
        torch.randn(7), random.random(), np.random.rand()  # noqa: NPY002
        model.head.weight.mul_(2.0)
        model.norm.running_mean.add_(1.0)
        return found

    calm, meddled = (
        dy.patch_window(recipe, live.last, [contrast], patched, measure, [1, 2, 3])
        for measure in (margin, meddling)
    )
    assert calm.drop_attrs().equals(meddled.drop_attrs())


def test_a_window_gives_the_same_bits_wherever_the_callers_generators_stand():
    recipe, live = normed(model=classifier(norm=True, dropout=0.5))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        found.append(dy.patch_window(recipe, live.last, [window(3)], pieces(recipe.model), margin))
    assert found[0].drop_attrs().identical(found[1].drop_attrs())


def test_without_recorded_generators_a_batch_exchanged_with_its_copy_still_has_no_effect():
    recipe, live = normed()
    last = live.last
    unknown = Checkpoint(
        last.step, last.parameters, last.buffers, last.optimizer, last.scheduler, None, last.fingerprint
    )
    batches = [points(i) for i in range(3)]
    pair = dy.Contrast(batches, copy.deepcopy(batches), points(9))
    before = torch.get_rng_state()
    result = dy.patch_window(recipe, unknown, [pair], pieces(recipe.model), margin, [1, 2, 3])
    assert (result["effect"] == 0).all()
    assert torch.equal(torch.get_rng_state(), before)


# --- errors -----------------------------------------------------------------------------------------------


def patch(base, source, after=None, more=()):
    recipe, live = normed()
    contrasts = [dy.Contrast(base, source, points(1)), *more]
    return dy.patch_window(recipe, live.last, contrasts, [Site("b", {"head.bias": ...})], margin, after)


def test_sequences_of_different_or_no_length_are_refused():
    batches = [points(i) for i in range(3)]
    with pytest.raises(ValueError, match=r"sequences of batches of one length; these hold \[2, 3\]"):
        patch(batches, batches[:2])
    with pytest.raises(ValueError, match=r"these hold \[1, 3\]"):
        patch(batches, batches, more=[dy.Contrast(batches[:1], batches[:1], points(1))])
    with pytest.raises(ValueError, match=r"these hold \[0\]"):
        patch([], [])
    with pytest.raises(ValueError, match=r"these hold \[0, 3\]"):
        patch(batches, [])


@pytest.mark.parametrize("after", [[0], [4], [-1], [1, 4], [2, 1], [2, 2], []])
def test_steps_outside_the_window_or_not_rising_are_refused_with_the_range(after):
    batches = [points(i) for i in range(3)]
    with pytest.raises(ValueError, match=r"give rising numbers of steps from 1 to 3"):
        patch(batches, batches, after)


@pytest.mark.parametrize("missing", ["contrasts", "sites"])
def test_a_window_of_nothing_is_said_to_be_nothing(missing):
    recipe, live = normed()
    given, patched = ([], pieces(recipe.model)) if missing == "contrasts" else ([window()], [])
    for after in (None, [1]):
        with pytest.raises(ValueError, match=f"patch_window was given no {missing}"):
            dy.patch_window(recipe, live.last, given, patched, margin, after)


def test_a_recipe_without_a_loss_or_an_optimizer_is_told_what_to_give():
    for given in ({"loss": classifier_loss}, {"optimizer": OPTIMIZERS["AdamW"]}):
        recipe = dy.Recipe(classifier(norm=True), **given)
        with pytest.raises(RecipeError, match="takes a training step: give the recipe"):
            dy.patch_window(recipe, None, [window()], pieces(recipe.model), margin)


def test_a_site_outside_the_model_is_refused_before_any_step():
    recipe, live = normed()
    recipe, calls = counted(recipe)
    with pytest.raises(sites.SiteError, match="covers 'tail'"):
        dy.patch_window(recipe, live.last, [window()], [Site("t", {"tail": ...})], margin)
    assert calls == []


@pytest.mark.parametrize("side", ["base", "source"])
def test_a_gradient_that_is_not_finite_names_the_side_the_contrast_and_the_step(side):
    contrast = window(4)
    getattr(contrast, side)[2] = (torch.full((7, 5), torch.nan, dtype=torch.float64), points(0)[1])
    recipe, live = normed()
    site = [Site("b", {"head.bias": ...})]
    with pytest.raises(NonFiniteGradient, match=f"loss of the {side} batch of first.*step 5"):
        dy.patch_window(recipe, live.last, [contrast], site, margin)


# --- the user's things ------------------------------------------------------------------------------------


def long_window(mine):
    pair = mine.pair
    return dy.Contrast(
        [pair.base, pair.source, pair.base, pair.base],
        [pair.source, pair.source, pair.base, pair.source],
        pair.probe,
    )


@pytest.mark.parametrize(
    ("optimizer", "start"),
    [
        *((name, "stored") for name in ("AdamW", "Adam amsgrad", "SGD momentum", "RMSprop", "Adagrad")),
        ("AdamW", "fresh"),
        ("AdamW", "the model as it stands"),
    ],
)
def test_a_window_leaves_everything_as_it_was(optimizer, start):
    mine = belongings(optimizer)
    checkpoint = {"stored": mine.checkpoint, "fresh": mine.checkpoint.with_fresh_optimizer()}.get(start)
    patched = [*sites.parameters(mine.recipe.model), sites.everything(mine.recipe.model)]
    contrast = long_window(mine)
    result = dy.patch_window(
        mine.recipe, checkpoint, [contrast, contrast.reversed()], patched, margin, [1, 2, 4]
    )
    assert mine.changes() == []
    assert (result["source"] != result["base"]).all()


@pytest.mark.parametrize(
    "call", [2, 6, 10, 15, 18], ids=["base", "source", "coasting", "patched", "another site"]
)
def test_a_loss_that_raises_in_the_third_step_leaves_everything_as_it_was(call):
    """Four losses for the base, the source and the coasting run; six for each site, two steps being shared."""
    calls = []

    def loss(model, batch):
        found = draw_from_every_generator(model, batch)
        calls.append(batch)
        if len(calls) > call:
            raise Broken
        return found

    mine = belongings(loss=loss)
    with pytest.raises(Broken):
        dy.patch_window(
            mine.recipe, mine.checkpoint, [long_window(mine)], sites.parameters(mine.recipe.model), margin
        )
    assert mine.changes() == []


def test_an_optimizer_that_raises_in_the_third_step_leaves_everything_as_it_was():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.taken = getattr(self, "taken", 0) + 1
            if self.taken == 3:
                raise Broken

    mine = belongings("SGD momentum")
    recipe = dy.Recipe(
        mine.recipe.model, mine.recipe.loss, partial(Failing, lr=0.1, momentum=0.9), clip=mine.recipe.clip
    )
    with pytest.raises(Broken):
        dy.patch_window(
            recipe, mine.checkpoint, [long_window(mine)], sites.parameters(recipe.model), margin, [1, 4]
        )
    assert mine.changes() == []


@pytest.mark.parametrize("call", [0, 2, 5, 17])
def test_a_measure_that_raises_between_the_steps_leaves_everything_as_it_was(call):
    calls = []

    def measure(model, batch):
        calls.append(model(batch[0]))
        if len(calls) > call:
            raise Broken
        return margin(model, batch)

    mine = belongings()
    with pytest.raises(Broken):
        dy.patch_window(
            mine.recipe,
            mine.checkpoint,
            [long_window(mine)],
            sites.parameters(mine.recipe.model),
            measure,
            [1, 2, 3, 4],
        )
    assert mine.changes() == []


def test_a_window_in_single_precision_is_the_training_loops():
    recipe = transformer_recipe(
        model=transformer("float32"), max_grad_norm=0.3, optimizer=OPTIMIZERS["SGD momentum"]
    )
    live = trained(recipe, [tokens(seed) for seed in range(3)])
    contrast = dy.Contrast([tokens(10), tokens(11)], [tokens(12), tokens(13)], tokens(14))
    patched = sites.heads(recipe.model)
    found = along(recipe, live.last, contrast, patched, [2])
    for site in patched:
        expected = slow_window(recipe, live, contrast, site)[-1]
        assert gap(floats(found[site.label][0]), floats(expected)) < 2e-5
