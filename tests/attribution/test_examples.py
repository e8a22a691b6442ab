"""attribute_examples beside leaving each row out by hand: copies, ordinary backward passes, torch's own steps."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch.optim import SGD, AdamW

import dynamics as dy
from dynamics.engine.batch_rows import split_rows
from tests.zoo.cases import first_quick
from tests.zoo.small_models import (
    CLIPS,
    LOOPED,
    OPTIMIZERS,
    by_itself,
    classifier_recipe,
    clip,
    margin,
    points,
    spread,
    tokens,
    trained,
    transformer_recipe,
)

BATCHES = [points(seed) for seed in range(3)]
BATCH = points(10)
PROBES = [
    dy.Contrast(None, None, points(12), {"example": "first", "alias": 3}),
    dy.Contrast(None, None, points(13), {"example": "second", "alias": 5}),
]
both_states = pytest.mark.parametrize("fresh", [False, True], ids=["stored", "fresh"])


def stepped_without(recipe, live, batch, row, fresh):
    """A copy of the live model after torch's own step on the batch with one row's loss weighing nothing."""
    model, optimizer = copy.deepcopy((live.model, live.optimizer))
    if fresh:
        optimizer = recipe.optimizer(list(model.parameters()))
    optimizer.zero_grad()
    x, y = batch
    weights = torch.ones(len(x), dtype=torch.float64)
    if row is not None:
        weights[row] = 0
    (F.cross_entropy(model(x), y, reduction="none") * weights).mean().backward()
    clip(recipe, model)
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD momentum", "AdamW in two groups", "RMSprop"])
@pytest.mark.parametrize("clipping", first_quick(CLIPS, 2))
@pytest.mark.parametrize("fresh", first_quick([False, True]), ids=["stored", "fresh"])
def test_each_row_has_the_gradient_of_the_measure_times_what_leaving_it_out_changes(
    optimizer, clipping, fresh
):
    recipe = classifier_recipe(optimizer={**OPTIMIZERS, **LOOPED}[optimizer], clip=CLIPS[clipping])
    live = trained(recipe, BATCHES)
    checkpoint = live.last.with_fresh_optimizer() if fresh else live.last
    measures = {"margin": margin, "spread": spread}
    found = dy.attribute_examples(recipe, checkpoint, BATCH, PROBES, measures)["attribution"]
    whole = stepped_without(recipe, live, BATCH, None, fresh)
    others = [stepped_without(recipe, live, BATCH, i, fresh) for i in range(7)]
    for i, probe in enumerate(PROBES):
        for name, measure in measures.items():
            gradients = torch.autograd.grad(measure(whole, probe.probe).mean(), list(whole.parameters()))
            for row, other in enumerate(others):
                pairs = zip(whole.parameters(), other.parameters(), strict=True)
                expected = sum(
                    float((g * (p - q)).detach().sum()) for g, (p, q) in zip(gradients, pairs, strict=True)
                )
                value = found.sel(measure=name).isel(example=i, row=row).item()
                assert value == pytest.approx(expected, abs=1e-9)


@both_states
def test_it_foretells_what_leaving_the_row_out_does_to_the_measure(fresh):
    recipe = classifier_recipe(optimizer=partial(AdamW, lr=1e-4), max_grad_norm=0.1)
    live = trained(recipe, BATCHES)
    checkpoint = live.last.with_fresh_optimizer() if fresh else live.last
    found = dy.attribute_examples(recipe, checkpoint, BATCH, PROBES, margin)
    for i, probe in enumerate(PROBES):
        base = margin(stepped_without(recipe, live, BATCH, None, fresh), probe.probe).mean().item()
        assert found["base"][i].item() == pytest.approx(base, abs=1e-12)
        for row in range(7):
            without = margin(stepped_without(recipe, live, BATCH, row, fresh), probe.probe).mean().item()
            value = found["attribution"][i, row].item()
            assert value == pytest.approx(base - without, rel=0.05, abs=2e-8)


@pytest.mark.slow
@both_states
def test_ranks_are_those_of_replays_without_the_row_and_closer_to_them_than_tracins(fresh):
    recipe = transformer_recipe()
    checkpoint = trained(recipe, [tokens(seed, rows=16) for seed in range(3)]).last
    checkpoint = checkpoint.with_fresh_optimizer() if fresh else checkpoint
    batch, probe = tokens(10, rows=16), dy.Contrast(None, None, tokens(12))
    measure = dy.measures.correct_logit
    found = dy.attribute_examples(recipe, checkpoint, batch, [probe], measure)["attribution"].values[0]
    model = copy.deepcopy(recipe.model).eval()

    def measured(parameters):
        model.load_state_dict(parameters)
        return measure(model, probe.probe).mean()

    whole = measured(dy.steps.replay(recipe, checkpoint, batch).parameters).item()
    exact, tracin = [], []
    for row in range(16):
        rest = torch.tensor([i for i in range(16) if i != row])
        exact.append(whole - measured(dy.steps.replay(recipe, checkpoint, batch[rest]).parameters).item())
    gradients = torch.autograd.grad(measured(checkpoint.parameters), list(model.parameters()))
    for row in split_rows(batch):
        of_row = dy.steps.gradient(recipe, checkpoint, row).gradients.values()
        tracin.append(-sum(float((g * h).sum()) for g, h in zip(gradients, of_row, strict=True)))
    ours, theirs = (spearmanr(ranked, exact).statistic for ranked in (found, tracin))
    assert ours > 0.95
    assert ours > theirs


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_where_rows_add_up_in_the_optimizer_integrated_attributions_add_up_to_the_step(momentum):
    recipe = classifier_recipe(optimizer=partial(SGD, lr=0.1, momentum=momentum))
    checkpoint = trained(recipe, BATCHES).last
    found = dy.attribute_examples(recipe, checkpoint, BATCH, PROBES, margin, "integrated", tolerance=1e-10)
    total = found["attribution"].sum("row")
    done = found["base"] - found["coasted"]
    np.testing.assert_allclose(total, done, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["residual"], total - done, rtol=0, atol=1e-15)
    assert abs(done).min() > 1e-3
    first = dy.attribute_examples(recipe, checkpoint, BATCH, PROBES, margin)
    assert abs(first["residual"]).min() > 1e-6
    clipped = replace(recipe, clip=CLIPS["by norm"])
    found = dy.attribute_examples(clipped, checkpoint, BATCH, PROBES, margin, "integrated", tolerance=1e-10)
    assert abs(found["residual"]).min() > 1e-5  # clipped, a row left out makes room for the others


def test_the_only_row_of_a_batch_did_all_that_its_gradient_did():
    recipe = classifier_recipe()
    checkpoint = trained(recipe, BATCHES).last
    found = dy.attribute_examples(
        recipe, checkpoint, points(10, rows=1), PROBES, margin, "integrated", tolerance=1e-10
    )
    assert found.sizes["row"] == 1
    np.testing.assert_allclose(
        found["attribution"][:, 0], found["base"] - found["coasted"], rtol=0, atol=1e-9
    )
    assert abs(found["attribution"]).min() > 1e-5


def test_rows_in_another_order_have_the_same_attributions_and_equal_rows_equal_ones():
    recipe = classifier_recipe(max_grad_norm=0.1)
    checkpoint = trained(recipe, BATCHES).last
    order = torch.tensor([3, 0, 6, 6, 1])
    x, y = BATCH
    one = dy.attribute_examples(recipe, checkpoint, (x[order], y[order]), PROBES, margin)["attribution"]
    other = dy.attribute_examples(recipe, checkpoint, (x[order.flip(0)], y[order.flip(0)]), PROBES, margin)[
        "attribution"
    ]
    np.testing.assert_allclose(one.values, other.values[:, ::-1], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(one[:, 2], one[:, 3])


def test_a_result_has_probes_by_rows(tmp_path):
    recipe = classifier_recipe()
    checkpoint = trained(recipe, BATCHES).last
    measures = {"margin": by_itself(margin), "spread": by_itself(spread)}
    found = dy.attribute_examples(recipe, checkpoint, BATCH, PROBES, measures)
    assert set(found.data_vars) == {"attribution", "residual", "nodes", "base", "untouched", "coasted"}
    assert found["attribution"].dims == ("measure", "example", "row")
    assert found["residual"].dims == found["base"].dims == ("measure", "example")
    assert found["row"].values.tolist() == list(range(7))
    assert found["alias"].values.tolist() == [3, 5]
    assert "layer" not in found.coords
    pairs = [dy.Contrast(BATCH, points(11), probe.probe) for probe in PROBES]
    exchanged = dy.patch_updates(recipe, checkpoint, pairs, [dy.sites.everything(recipe.model)], measures)
    for name in ("base", "untouched", "coasted"):
        np.testing.assert_array_equal(found[name], exchanged[name])
    for i, probe in enumerate(PROBES):
        alone = dy.attribute_examples(recipe, checkpoint, BATCH, [probe], by_itself(margin))
        np.testing.assert_array_equal(alone["attribution"][0], found["attribution"].sel(measure="margin")[i])
    dy.results.save(found, tmp_path / "rows.h5")
    assert dy.results.load(tmp_path / "rows.h5").identical(found)
