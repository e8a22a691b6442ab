"""Rows of a training batch: splitting it, their gradients, and the step without one of them."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SparseAdam

import dynamics as dy
from dynamics.batch import Batch
from dynamics.engine.batch_rows import row_gradients, row_updates, split_rows
from dynamics.engine.gradient_prefetch import GradientPrefetch
from dynamics.engine.runs import Runs, reference_models_trimmed
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.update import Steps
from tests.zoo.small_models import (
    classifier,
    classifier_loss,
    classifier_recipe,
    margin,
    points,
    tokens,
    trained,
    transformer,
    transformer_recipe,
)

BATCH = points(10)
PROBES = [dy.Contrast(None, None, points(12)), dy.Contrast(None, None, points(13))]


def test_a_batch_of_any_kind_is_split_along_its_first_axis():
    batch = tokens(0, rows=3)
    for i, row in enumerate(split_rows(batch)):
        assert isinstance(row, Batch)
        assert torch.equal(row.tokens, batch.tokens[i : i + 1])
        assert row.example_ids is None
    x, y = points(0, rows=2)
    nested = split_rows({"points": (x, [y]), "route": "left", "scale": torch.tensor(2.0)})
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


def test_of_a_token_that_one_row_alone_has_nothing_is_left_without_it():
    """Exactly: a fresh Adam makes a full step of any rounding that is left."""
    recipe = transformer_recipe(model=transformer("float32"))
    checkpoint = trained(recipe, [tokens(0), tokens(1)]).last.with_fresh_optimizer()
    batch = tokens(2, rows=5, below=10)
    batch = replace(batch, tokens=batch.tokens.clone())
    batch.tokens[3, 0] = 10
    whole = dy.Contrast(batch, batch)
    runs = Runs(
        Steps(recipe, checkpoint),
        whole,
        "a batch",
        GradientPrefetch(recipe, checkpoint, [whole], ComputePaths()),
    )
    ((_, coasted, base, _),) = reference_models_trimmed(runs)
    moved = row_updates(runs, row_gradients(runs, split_rows(batch)), base)
    alone = (base["embed.W_E"] - coasted["embed.W_E"])[10]
    assert torch.equal(moved["embed.W_E"][3, 10], alone)
    assert float(alone.abs().min()) > 1e-3


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
