"""A batch's gradient by source: each part is its rows' own, and all of them add up."""

import pytest
import torch

from dynamics.engine.batch_sources import rows_of_sources, some_rows, source_gradients
from dynamics.steps import gradient
from dynamics.steps.fallbacks import ComputePaths
from dynamics.steps.states import starting_point
from tests.zoo.small_models import classifier_recipe, points, tokens, transformer_recipe

LABELS = ["table", 17, "table", "questions", 17, "table"]


def test_sources_are_groups_of_rows_in_the_order_they_come():
    assert rows_of_sources(tokens(0), LABELS) == {"table": [0, 2, 5], "17": [1, 4], "questions": [3]}


@pytest.mark.parametrize("labels", [LABELS, list(range(6)), ["all"] * 6], ids=["some", "each row", "one"])
def test_each_part_is_the_gradient_of_its_rows_loss_and_they_add_up_to_the_batchs(labels):
    recipe, batch = transformer_recipe(), tokens(3)
    state = starting_point(recipe, None)
    whole = gradient(recipe, state, batch).gradients
    parts = dict(source_gradients(recipe, state, batch, lambda b: labels, ComputePaths("a test")))
    assert set(parts) == {str(label) for label in labels}
    for name, g in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts.values()), g, rtol=0, atol=1e-14)
    for label, numbers in rows_of_sources(batch, labels).items():
        own = gradient(recipe, state, some_rows(batch, numbers)).gradients
        for name, g in own.items():
            torch.testing.assert_close(parts[label][name], g * len(numbers) / 6, rtol=0, atol=1e-14)


def test_a_parameter_that_only_some_sources_use_has_a_part_from_those():
    recipe = classifier_recipe(loss=lambda model, batch: (model.encoder(batch[0]) * batch[1][:, None]).mean())
    x, y = points(0)
    batch = (x, torch.zeros_like(y).index_fill(0, torch.tensor([0]), 1))
    state = starting_point(recipe, None)
    parts = dict(
        source_gradients(recipe, state, batch, lambda b: ["a"] * 3 + ["b"] * 4, ComputePaths("a test"))
    )
    assert parts["a"]["encoder.weight"].any()
    assert not parts["b"]["encoder.weight"].any()
    assert parts["a"]["head.weight"] is None
