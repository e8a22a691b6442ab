"""The account of a stretch of training: it adds up, and is what a bare loop with a dense trapezoid finds."""

from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import dynamics as dy
from dynamics import measures, sites
from dynamics.recipe import RecipeError
from dynamics.sites import Site, SiteError
from tests.oracles.training_account import account_by_loop
from tests.zoo.cases import first_quick
from tests.zoo.small_models import (
    CLIPS,
    LOOPED,
    OPTIMIZERS,
    by_itself,
    classifier,
    classifier_loss,
    classifier_recipe,
    margin,
    points,
    spread,
    tokens,
    trained,
    transformer_recipe,
)

BATCHES = [points(seed) for seed in range(8)]
PROBES = {"first": points(50), "second": points(51), "third": points(52)}


def each_tensor(model):
    return [Site(name, {name: ...}) for name, _ in model.named_parameters()]


def by_parity(batch):
    """Two sources: even and odd rows."""
    return ["even", "odd"] * (len(batch[1]) // 2) + ["even"] * (len(batch[1]) % 2)


def account(recipe, checkpoint=None, batches=BATCHES, probes=PROBES, measure=margin, **changes):
    return dy.attribute_training(
        recipe, checkpoint, batches, each_tensor(recipe.model), probes, measure, **changes
    )


def change(found):
    return found["value"].isel(step=-1) - found["value"].isel(step=0)


# --- it is right ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [pytest.param(None, marks=pytest.mark.slow), 0.1])
def test_on_a_classifier_it_is_what_a_bare_loop_with_a_dense_trapezoid_finds(max_norm):
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    recipe = classifier_recipe(optimizer=optimizer, max_grad_norm=max_norm)
    rows = [
        {label: [i for i, s in enumerate(by_parity(b)) if s == label] for label in ("even", "odd")}
        for b in BATCHES[:4]
    ]
    expected, values = account_by_loop(
        recipe.model,
        classifier_loss,
        BATCHES[:4],
        margin,
        PROBES["first"],
        rows,
        decay=0.1,
        max_norm=max_norm,
    )
    found = account(recipe, batches=BATCHES[:4], sources=by_parity, tolerance=0, max_nodes=65)
    found = found.sel(example="first")
    np.testing.assert_allclose(found["value"], values, rtol=0, atol=1e-12)
    for step, by_source in enumerate(expected, start=1):
        for label, by_name in by_source.items():
            for name, attributed in by_name.items():
                ours = found["attribution"].sel(step=step, source=label, site=name)
                assert float(ours) == pytest.approx(attributed, abs=2e-7, rel=1e-4)


@pytest.mark.slow
def test_on_a_transformer_it_is_what_a_bare_loop_with_a_dense_trapezoid_finds():
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    recipe = transformer_recipe(optimizer=optimizer, max_grad_norm=0.5)
    batches, probe = [tokens(seed) for seed in range(4)], tokens(9)

    def loss(model, batch):
        return measures.cross_entropy(model, dy.Batch(*batch))

    def logit(model, batch):
        return measures.correct_logit(model, batch)

    rows = [{"early": [0, 1], "late": [2, 3, 4, 5]} for _ in batches]
    plain = [(b.tokens, b.target_pos, b.targets) for b in batches]
    expected, values = account_by_loop(recipe.model, loss, plain, logit, probe, rows, decay=0.1, max_norm=0.5)
    found = dy.attribute_training(
        recipe,
        None,
        batches,
        each_tensor(recipe.model),
        {"p": probe},
        measures.correct_logit,
        sources=lambda batch: ["early"] * 2 + ["late"] * 4,
        tolerance=0,
        max_nodes=33,
    ).isel(example=0)
    np.testing.assert_allclose(found["value"], values, rtol=0, atol=1e-12)
    for step, by_source in enumerate(expected, start=1):
        for label, by_name in by_source.items():
            ours = found["attribution"].sel(step=step, source=label, site=list(by_name))
            np.testing.assert_allclose(ours, list(by_name.values()), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("optimizer", first_quick([*LOOPED, *OPTIMIZERS], 5))
def test_for_every_optimizer_it_adds_up_to_the_change_of_the_measure(optimizer):
    recipe = classifier_recipe(optimizer={**OPTIMIZERS, **LOOPED}[optimizer], clip=CLIPS["by value"])
    found = account(recipe, tolerance=1e-9)
    assert abs(change(found)).min() > 1e-4
    total = found["attribution"].sum(("step", "site"))
    np.testing.assert_allclose(total - change(found), found["residual"].sum("step"), rtol=0, atol=1e-13)
    assert abs(found["residual"]).max() < 1e-7
    assert found.attrs["partition"] == 1


@pytest.mark.parametrize("optimizer", first_quick((name for name in OPTIMIZERS if "amsgrad" not in name), 3))
def test_the_sources_add_up_to_the_account_without_them(optimizer):
    recipe = classifier_recipe(optimizer=OPTIMIZERS[optimizer], clip=CLIPS["by norm"])
    state = trained(recipe, [points(90), points(91)]).last
    without = account(recipe, state)
    found = account(recipe, state, sources=by_parity)
    assert list(found["source"].values) == ["even", "odd", "before", "decay"]
    np.testing.assert_allclose(found["attribution"].sum("source"), without["attribution"], rtol=0, atol=1e-12)
    xr.testing.assert_equal(found["value"], without["value"])
    xr.testing.assert_allclose(found["residual"], without["residual"], rtol=0, atol=1e-12)


def test_the_steps_are_those_of_ordinary_training_bit_for_bit():
    scheduler = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: (step + 1) / 8)
    recipe = classifier_recipe(
        model=classifier(norm=True, dropout=0.3), scheduler=scheduler, clip=CLIPS["by norm"]
    )
    live = trained(recipe, BATCHES, seed=3)
    found = account(recipe, live.checkpoints[2], BATCHES[2:], measure=by_itself(spread))
    assert list(found["step"].values) == list(range(2, 9))
    for step in (2, 5, 8):
        checkpoint = live.checkpoints[step]
        own = classifier(norm=True)
        checkpoint.restore(own)
        own.eval()
        for label, probe in PROBES.items():
            with torch.no_grad():
                assert float(found["value"].sel(step=step, example=label)) == float(spread(own, probe))


def test_stretches_that_meet_are_the_whole_stretch():
    recipe = classifier_recipe()
    live = trained(recipe, BATCHES)
    whole = account(recipe, live.checkpoints[0])
    halves = [
        account(recipe, live.checkpoints[0], BATCHES[:4]),
        account(recipe, live.checkpoints[4], BATCHES[4:]),
    ]
    for name in ("attribution", "value", "residual"):
        joined = xr.concat([halves[0][name], halves[1][name].isel(step=slice(1, None))], "step")
        xr.testing.assert_equal(joined, whole[name])


def test_several_steps_make_one_entry():
    recipe = classifier_recipe()
    single, several = account(recipe), account(recipe, every=3)
    assert list(several["step"].values) == [0, 3, 6, 8]
    for first, last in ((0, 3), (3, 6), (6, 8)):
        expected = single.sel(step=slice(first + 1, last)).sum("step")
        np.testing.assert_allclose(
            several["attribution"].sel(step=last), expected["attribution"], rtol=0, atol=1e-15
        )
        np.testing.assert_allclose(
            several["residual"].sel(step=last), expected["residual"], rtol=0, atol=1e-15
        )
        xr.testing.assert_equal(several["value"].sel(step=last), single["value"].sel(step=last))
    assert not several["attribution"].isel(step=0).any()


def test_more_nodes_leave_a_smaller_residual_and_only_where_asked():
    recipe = classifier_recipe(optimizer=partial(torch.optim.SGD, lr=1.0))
    plain, finer = account(recipe, max_nodes=2), account(recipe, tolerance=0.003)
    steps = slice(1, None)
    assert set(np.unique(plain["nodes"].isel(step=steps))) == {2}
    refined = (finer["nodes"] > 2).isel(step=steps)
    assert refined.any()
    assert not refined.all()
    ours, theirs = (abs(found["residual"]).isel(step=steps) for found in (finer, plain))
    assert float(ours.where(refined).sum()) < 0.02 * float(theirs.where(refined).sum())
    np.testing.assert_array_equal(ours.where(~refined), theirs.where(~refined))


@pytest.mark.slow
def test_many_probes_at_once_are_each_what_it_is_alone():
    recipe = transformer_recipe()
    probes = {str(seed): tokens(seed) for seed in range(20, 25)}
    batches = [tokens(seed) for seed in range(3)]
    asked = {"logit": measures.correct_logit, "margin": measures.logit_margin}
    parts = sites.heads(recipe.model)
    together = dy.attribute_training(recipe, None, batches, parts, probes, asked)
    assert "vmap over probes" in together.attrs["provenance"]
    assert together.attrs["partition"] == 0
    for label, probe in probes.items():
        alone = dy.attribute_training(recipe, None, batches, parts, {label: probe}, asked)
        for name in ("attribution", "value", "residual"):
            np.testing.assert_allclose(together[name].sel(example=[label]), alone[name], rtol=0, atol=1e-12)
    assert dict(together.sizes) == {"measure": 2, "step": 4, "site": len(parts), "example": 5}


def test_what_batch_statistics_do_is_left_in_the_residual():
    recipe = classifier_recipe(model=classifier(norm=True))
    found = account(recipe, tolerance=1e-6)
    total = found["attribution"].sum(("step", "site"))
    assert abs(total - change(found)).max() > 1e-4
    np.testing.assert_allclose(total - change(found), found["residual"].sum("step"), rtol=0, atol=1e-13)
    assert found["nodes"].max() < 10


def test_batches_are_asked_for_once_and_in_order():
    asked = []

    class Lazy:
        def __len__(self):
            return len(BATCHES)

        def __getitem__(self, i):
            asked.append(i)
            return BATCHES[i]

    xr.testing.assert_equal(
        account(classifier_recipe(), batches=Lazy())["value"], account(classifier_recipe())["value"]
    )
    assert asked == list(range(8))


def test_it_is_kept_in_a_file_as_it_is(tmp_path):
    found = account(classifier_recipe(), sources=by_parity)
    dy.results.save(found, tmp_path / "account.h5")
    xr.testing.assert_identical(dy.results.load(tmp_path / "account.h5"), found)


# --- nothing is left behind -------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [None, 5])
def test_model_random_numbers_and_gradients_are_as_before(fails_at):
    model = classifier(norm=True, dropout=0.3).eval()
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyboardInterrupt
        return classifier_loss(model, batch)

    recipe = classifier_recipe(model=model, loss=loss)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    drawn = torch.get_rng_state()
    if fails_at:
        with pytest.raises(KeyboardInterrupt):
            account(recipe)
    else:
        account(recipe)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in tensors.items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


# --- what it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"batches": []}, ValueError, "0 batches"),
        ({"every": 0}, ValueError, "every=0"),
        ({"probes": {}}, ValueError, "no contrasts"),
        ({"sources": lambda batch: ["a"]}, ValueError, "1 labels for 7 rows"),
        ({"sources": lambda batch: ["decay"] * 7}, ValueError, "called 'decay'"),
    ],
)
def test_a_wrong_argument_is_named(changes, error, says):
    with pytest.raises(error, match=says):
        account(classifier_recipe(), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "loss": lambda model, batch: nn.functional.cross_entropy(
                model(batch[0]), batch[1], reduction="sum"
            )
        },
        {"model": classifier(norm=True)},
        {"model": classifier(dropout=0.5)},
    ],
    ids=["sum", "batch statistics", "dropout"],
)
def test_sources_need_a_loss_that_is_a_mean_over_rows(changes):
    with pytest.raises(ValueError, match="mean over the batch's rows"):
        account(classifier_recipe(**changes), sources=by_parity)


def test_sources_need_an_optimizer_that_can_be_divided_and_the_account_does_not():
    recipe = classifier_recipe(optimizer=OPTIMIZERS["AdamW amsgrad"])
    with pytest.raises(RecipeError, match="amsgrad"):
        account(recipe, sources=by_parity)
    account(recipe)


def test_sites_with_positions_are_refused():
    recipe = transformer_recipe()
    part = sites.at_positions(sites.matrices(recipe.model)[-1:], {"first": 0})
    with pytest.raises(SiteError, match="positions"):
        dy.attribute_training(recipe, None, [tokens(0)], part, {"p": tokens(1)}, measures.correct_logit)


def test_a_scaler_that_may_skip_a_step_has_no_sources():
    recipe = classifier_recipe(scaler=partial(torch.amp.GradScaler, "cpu"))
    with pytest.raises(RecipeError, match="GradScaler may skip"):
        account(recipe, sources=by_parity)


def test_accumulated_micro_batches_have_the_account_of_one_batch_of_all_their_rows():
    micro = [[points(seed, 4), points(seed + 20, 4)] for seed in range(4)]
    whole = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in micro]
    one = account(
        classifier_recipe(clip=CLIPS["by norm"]), batches=whole, sources=lambda b: ["even", "odd"] * 4
    )
    accumulated = classifier_recipe(clip=CLIPS["by norm"], accumulate=2)
    found = account(accumulated, batches=micro, sources=by_parity)
    for name in ("attribution", "value", "residual"):
        np.testing.assert_allclose(found[name], one[name], rtol=0, atol=1e-12)


def test_an_error_says_at_which_step_it_happened():
    calls = []

    def measure(model, batch):
        calls.append(1)
        if len(calls) > len(PROBES) * 2:
            raise ZeroDivisionError
        return margin(model, batch)

    with pytest.raises(ZeroDivisionError) as caught:
        account(classifier_recipe(), measure=measure)
    assert any("This happened in step " in note for note in caught.value.__notes__)
