"""Nothing of the user's is changed by an attribution, not when something fails halfway either."""

import pytest
import torch

import dynamics as dy
from dynamics import sites
from tests.engine.test_runs_leaves_alone import Broken, belongings, draw_from_every_generator
from tests.zoo.small_models import classifier_loss, margin

CALLS = {
    "attribute_step": lambda mine, checkpoint, measure, method: dy.attribute_step(
        mine.recipe,
        checkpoint,
        [mine.pair, mine.pair.reversed()],
        [*sites.parameters(mine.recipe.model), sites.everything(mine.recipe.model)],
        measure,
        method,
    ),
    "attribute_examples": lambda mine, checkpoint, measure, method: dy.attribute_examples(
        mine.recipe, checkpoint, mine.pair.base, [mine.pair], measure, method
    ),
}
every_verb = pytest.mark.parametrize("verb", CALLS)
methods = pytest.mark.parametrize("method", ["first_order", "integrated"])


def noisy(model, batch):
    """Draws, writes to the model, and demands eval mode."""
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        model.norm.running_mean.add_(1.0)
        model.head.weight.mul_(2.0)
    return margin(model, batch) + draw_from_every_generator(model, batch)


def mine_for(verb, optimizer="AdamW", loss=None):
    """Belongings whose loss suits the verb: rows by themselves need a loss that is a mean over them."""
    if verb == "attribute_step":
        return belongings(optimizer, loss or draw_from_every_generator)
    mine = belongings(optimizer, loss or classifier_loss)
    mine.recipe.model.norm.eval()
    mine.recipe.model.drop.eval()
    mine.__post_init__()
    return mine


@pytest.mark.slow
@every_verb
@methods
@pytest.mark.parametrize(
    ("optimizer", "start"), [("AdamW", "stored"), ("RMSprop", "fresh"), ("AdamW", "the model as it stands")]
)
def test_everything_is_left_as_it_was(verb, method, optimizer, start):
    mine = mine_for(verb, optimizer)
    checkpoint = {"stored": mine.checkpoint, "fresh": mine.checkpoint.with_fresh_optimizer()}.get(start)
    found = CALLS[verb](mine, checkpoint, {"noisy": noisy, "margin": margin}, method)
    assert mine.changes() == []
    assert abs(found["attribution"]).max() > 0
    again = CALLS[verb](mine, checkpoint, noisy, method)["attribution"]
    assert (again.values == found["attribution"].sel(measure="noisy").values).all()


@every_verb
@pytest.mark.parametrize("call", [0, 1, 6])
def test_a_measure_that_raises_leaves_everything_as_it_was(verb, call):
    calls = []

    def measure(model, batch):
        calls.append(model(batch[0]))
        if len(calls) > call:
            raise Broken
        return noisy(model, batch)

    mine = mine_for(verb)
    with pytest.raises(Broken):
        CALLS[verb](mine, mine.checkpoint, measure, "integrated")
    assert mine.changes() == []


@every_verb
@pytest.mark.parametrize("call", [0, 1])
def test_a_loss_that_raises_leaves_everything_as_it_was(verb, call):
    calls = []

    def loss(model, batch):
        calls.append(batch)
        if len(calls) > call:
            raise Broken
        return classifier_loss(model, batch)

    mine = mine_for(verb, loss=loss)
    with pytest.raises(Broken):
        CALLS[verb](mine, mine.checkpoint, margin, "integrated")
    assert mine.changes() == []


@every_verb
def test_gradients_are_taken_where_the_caller_has_turned_them_off(verb):
    mine = mine_for(verb)
    expected = CALLS[verb](mine, mine.checkpoint, margin, "integrated")
    with torch.no_grad():
        found = CALLS[verb](mine, mine.checkpoint, margin, "integrated")
    assert found.drop_attrs().identical(expected.drop_attrs())
