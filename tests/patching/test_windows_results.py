"""What windows measure and when, what they refuse, and that nothing of the user's changes."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites
from dynamics.recipe import RecipeError
from dynamics.sites import Site
from dynamics.steps import NonFiniteGradient
from tests.engine.test_runs_leaves_alone import Broken, belongings, draw_from_every_generator
from tests.oracles.windows_by_hand import (
    REFERENCES,
    along,
    counted,
    floats,
    normed,
    pieces,
    slow_window,
    window,
)
from tests.zoo.small_models import (
    OPTIMIZERS,
    by_itself,
    classifier,
    classifier_loss,
    gap,
    margin,
    points,
    spread,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)


def as_given(verb, n):
    """Contrasts of one verb that share base and source and are probed on different points."""
    contrast = window(2) if verb is dy.patch_window else dy.Contrast(points(10), points(20))
    return [dy.Contrast(contrast.base, contrast.source, points(30 + i), {"alias": i}) for i in range(n)]


@pytest.mark.slow
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
    at_once = 2  # the first batch by itself, then all of them
    assert numbers == [numbers[0], numbers[0], 3 * numbers[0] if verb is dy.patch_window else at_once]
    apart = [verb(recipe, live.last, [c], patched, {"margin": margin, "spread": spread}) for c in mixed]
    for i, alone in enumerate(apart):
        for name in ("patched", "effect", *REFERENCES):
            np.testing.assert_allclose(
                together[name].isel(example=[i]).values, alone[name].values, rtol=0, atol=1e-12
            )
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
        verb(recipe, live.last, given, pieces(recipe.model), measure)
        for measure in (shifted, by_itself(margin))
    )
    assert one.drop_attrs().drop_vars("measure", errors="ignore").equals(other.drop_attrs())


@pytest.mark.parametrize("verb", [dy.patch_gradients, dy.patch_updates])
def test_nor_does_one_that_writes_under_a_later_probe_alone(verb):
    """When all models are measured at once already; the checkpoint is not written into either."""
    recipe, live = normed()
    before = {name: tensor.clone() for name, tensor in live.last.parameters.items()}

    def at_times(model, batch):
        found = margin(model, batch)
        if len(batch[1]) == 5:
            model.head.bias.add_(torch.tensor([1.0, 0.0, 0.0]))
            model.encoder.weight.mul_(2.0)
        return found

    base, source = points(10), points(20)
    given = [dy.Contrast(base, source, points(30 + i, rows=rows)) for i, rows in enumerate((7, 5, 7))]
    one, other = (
        verb(recipe, live.last, given, pieces(recipe.model), measure) for measure in (at_times, margin)
    )
    for name in other.data_vars:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-12)
    assert all(torch.equal(live.last.parameters[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
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


def long_window(mine):
    pair = mine.pair
    return dy.Contrast(
        [pair.base, pair.source, pair.base, pair.base],
        [pair.source, pair.source, pair.base, pair.source],
        pair.probe,
    )


@pytest.mark.slow
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
