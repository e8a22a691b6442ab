"""What is compared between checkpoints, against the rows of the task."""

import pytest
import torch

from dynamics import tasks
from dynamics.config import AliasConfig, StudyConfig
from dynamics.tasks import AliasTask
from dynamics.tasks.aliases import SETS
from dynamics.tasks.probes import ORDERS


@pytest.fixture(scope="module")
def task() -> AliasTask:
    return AliasTask(StudyConfig(task=AliasConfig(modulus=20, multipliers=(2, 4, 5), train_multipliers=1)))


def is_alias(task, token):
    return task.modulus <= token < 2 * task.modulus


def test_every_alias_is_asked_what_training_never_asks(task):
    batches, coords = tasks.alias_questions(task)
    asked = [i for name in SETS for i in task.sets[name]]
    assert coords["integer"] == asked
    assert list(batches) == [f"alias {i}" for i in asked]
    for (label, batch), i, name in zip(batches.items(), asked, coords["set"], strict=True):
        assert label == f"alias {i}"
        assert i in task.sets[name]
        assert torch.equal(batch.tokens, task.questions(i).tokens)
    few, _ = tasks.alias_questions(task, ("Df4",))
    assert list(few) == [f"alias {i}" for i in task.sets["Df4"]]


def test_the_two_orders_are_a_partition_of_the_questions(task):
    batch = task.questions(task.sets["Dt3"][0])
    parts = [tasks.in_order(task, batch, order) for order in ORDERS]
    for part, place in zip(parts, (0, 1), strict=True):
        assert all(is_alias(task, row[place]) for row in part.tokens.tolist())
    rows = sorted(row for part in parts for row in part.tokens.tolist())
    assert rows == sorted(batch.tokens.tolist())
    with pytest.raises(ValueError, match="no order 'backwards'"):
        tasks.in_order(task, batch, "backwards")


def test_definitions_are_those_of_training_and_the_source_has_the_other_tag_alone(task):
    trained = {tuple(row) for phase in ("x1", "x2") for row in task.rows(phase).tokens.tolist()}
    contrasts = tasks.as_trained(task)
    assert [c.coords["integer"] for c in contrasts] == [i for name in SETS for i in task.sets[name]]
    for contrast in contrasts:
        (base,), (source,) = contrast.base.tokens.tolist(), contrast.source.tokens.tolist()
        assert tuple(base) in trained
        assert {base[0], source[0]} == {task.reliable, task.unreliable}
        assert base[1:] == source[1:]
        assert (base[0] == task.reliable) == (contrast.coords["set"] in ("DtQ1", "Dt3"))
        assert torch.equal(contrast.base.targets, contrast.source.targets)
        false = contrast.coords["set"] == "DfQ2"
        assert (int(contrast.base.targets[0]) != contrast.coords["integer"]) == false
        assert len(contrast.probe) == 2 * len(task.config.task.multipliers)


def test_roles_point_at_the_alias_at_the_tag_and_at_the_token_before(task):
    roles = tasks.head_roles(task)
    assert set(roles) == {"to alias", "to tag", "previous token"}
    for name, (batch, places) in roles.items():
        looked_at = batch.tokens[torch.arange(len(batch)), places].tolist()
        assert (places < batch.target_pos).all()
        if name == "to alias":
            assert all(is_alias(task, token) for token in looked_at)
        elif name == "to tag":
            assert set(looked_at) == {task.reliable, task.unreliable}
        else:
            assert (places == batch.target_pos - 1).all()
            assert not any(is_alias(task, token) for token in batch.tokens.flatten().tolist())
