"""attribute_examples beside leaving each row out by hand: copies, ordinary backward passes, torch's own steps."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_models import (
    CLIPS,
    LOOPED,
    OPTIMIZERS,
    classifier,
    classifier_loss,
    classifier_recipe,
    clip,
    margin,
    points,
    spread,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)
from torch import nn
from torch.optim import SGD, AdamW, SparseAdam

import dynamics as dy
from dynamics.attribution.rows import gradients_of_rows, moved_by_each, rows_of
from dynamics.batch import Batch
from dynamics.patching.experiment import Runs, stepped

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
@pytest.mark.parametrize("clipping", CLIPS)
@both_states
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


def test_of_a_token_that_one_row_alone_has_nothing_is_left_without_it():
    """Exactly: a fresh Adam makes a full step of any rounding that is left."""
    recipe = transformer_recipe(model=transformer("float32"))
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last.with_fresh_optimizer()
    batch = tokens(2, rows=5, below=10)
    batch = replace(batch, tokens=batch.tokens.clone())
    batch.tokens[3, 0] = 10
    runs = Runs(recipe, checkpoint, dy.Contrast(batch, batch), "a batch")
    base, coasted = stepped(runs, (runs.base, runs.coasting))
    moved = moved_by_each(runs, gradients_of_rows(runs, rows_of(batch)), base)
    alone = (base["embed.W_E"] - coasted["embed.W_E"])[10]
    assert torch.equal(moved["embed.W_E"][3, 10], alone)
    assert float(alone.abs().min()) > 1e-3


def test_a_result_has_probes_by_rows(tmp_path):
    recipe = classifier_recipe()
    checkpoint = trained(recipe, BATCHES).last
    measures = {"margin": margin, "spread": spread}
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
        alone = dy.attribute_examples(recipe, checkpoint, BATCH, [probe], margin)
        np.testing.assert_array_equal(alone["attribution"][0], found["attribution"].sel(measure="margin")[i])
    dy.results.save(found, tmp_path / "rows.h5")
    assert dy.results.load(tmp_path / "rows.h5").identical(found)


def test_a_sparse_gradient_stays_sparse_without_the_row():
    """SparseAdam moves the rows of an embedding that a batch has, and no others."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 3, sparse=True, dtype=torch.float64)

        def forward(self, x):
            return self.embed(x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        recipe = classifier_recipe(model=Bag(), optimizer=partial(SparseAdam, lr=0.1))
    words = [torch.tensor(x) for x in ([0, 1, 2, 3], [0, 1, 1, 5], [1, 5, 0, 0])]
    batches = [(x, x % 3) for x in words]
    checkpoint = trained(recipe, batches[:1]).last
    probe = dy.Contrast(None, None, batches[2])
    found = dy.attribute_examples(recipe, checkpoint, batches[1], [probe], margin)["attribution"][0]
    assert found[1].item() == found[2].item()
    keep = torch.tensor([0, 1, 2])
    base = dy.steps.replay(recipe, checkpoint, batches[1]).parameters["embed.weight"]
    without = dy.steps.replay(recipe, checkpoint, tuple(t[keep] for t in batches[1])).parameters[
        "embed.weight"
    ]
    leaf = base.clone().requires_grad_()
    logits = leaf[words[2]]
    value = (logits.gather(-1, batches[2][1][:, None]).squeeze(-1) - logits.mean(-1)).mean()
    (g,) = torch.autograd.grad(value, leaf)
    assert float((g * (base - without))[5].sum()) == pytest.approx(found[3].item(), abs=1e-12)
    assert found[3].item() != 0


# --- rows of a batch --------------------------------------------------------------------------------------


def test_a_batch_of_any_kind_is_split_along_its_first_axis():
    batch = tokens(0, rows=3)
    for i, row in enumerate(rows_of(batch)):
        assert isinstance(row, Batch)
        assert torch.equal(row.tokens, batch.tokens[i : i + 1])
        assert row.example_ids is None
    x, y = points(0, rows=2)
    nested = rows_of({"points": (x, [y]), "route": "left", "scale": torch.tensor(2.0)})
    assert len(nested) == 2
    assert torch.equal(nested[1]["points"][1][0], y[1:])
    assert [row["route"] for row in nested] == ["left", "left"]
    assert nested[0]["scale"].item() == 2.0


@pytest.mark.parametrize(
    "batch",
    ["words", (torch.zeros(2), torch.zeros(3)), torch.tensor(1.0), (torch.zeros(0, 5), torch.zeros(0))],
)
def test_a_batch_without_rows_says_so(batch):
    with pytest.raises(ValueError, match="cannot be split into rows"):
        dy.attribute_examples(classifier_recipe(), None, batch, PROBES, margin)


def total(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def by_class(model, batch):
    return F.cross_entropy(
        model(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": total}, "rows miss the batch's own gradient"),
        ({"loss": by_class}, "rows miss the batch's own gradient"),
        ({"model": classifier(dropout=0.5)}, "rows miss the batch's own gradient"),
        ({"model": classifier(norm=True)}, "more than 1 value per channel"),
    ],
)
def test_a_loss_that_is_no_mean_over_rows_is_refused(changes, message):
    recipe = classifier_recipe(**changes)
    with pytest.raises(ValueError, match=message) as refused:
        dy.attribute_examples(recipe, None, BATCH, PROBES, margin)
    said = "".join([str(refused.value), *getattr(refused.value, "__notes__", [])])
    assert "mean over the batch's rows" in said


def test_rounding_in_single_precision_and_under_autocast_is_not_taken_for_another_loss():
    def in_bf16(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return classifier_loss(model, batch)

    x, y = points(10, rows=64, dtype=torch.float32)
    probe = dy.Contrast(None, None, points(12, dtype=torch.float32))
    for loss in (classifier_loss, in_bf16):
        recipe = classifier_recipe(model=classifier(dtype=torch.float32), loss=loss)
        found = dy.attribute_examples(recipe, None, (x, y), [probe], margin)
        assert np.isfinite(found["attribution"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": []}, "given no probes"),
        ({"method": "third"}, "'third'; expected one of"),
        ({"measure": torch.no_grad()(margin)}, "has no gradient"),
    ],
)
def test_what_cannot_be_attributed_is_refused(changes, message):
    arguments = {"probes": PROBES, "measure": margin, **changes}
    with pytest.raises(ValueError, match=message):
        dy.attribute_examples(classifier_recipe(), None, BATCH, **arguments)
