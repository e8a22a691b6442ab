"""Capturing and restoring one moment of training."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from checkpoints import Checkpoint
from checkpoints.values import same_bits


def test_a_checkpoint_is_unaffected_by_later_training(trained, train):
    model, optimizer = trained
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = Checkpoint.capture(model, optimizer, scheduler, step=3)
    twin = Checkpoint.capture(model, optimizer, scheduler, step=3)
    train(model, optimizer, range(3, 6), scheduler)
    assert before.equals(twin)
    changed = Checkpoint.capture(model, optimizer, scheduler, step=3).differences(before)
    for name in (
        "parameters/embed.weight",
        "buffers/norm.running_mean",
        "optimizer/groups/0/lr",
        "optimizer/state/embed.weight/exp_avg",
        "optimizer/state/embed.weight/step",
        "scheduler/last_epoch",
    ):
        assert name in changed


def test_training_a_restored_model_leaves_the_checkpoint_alone(trained, train, tiny):
    checkpoint = Checkpoint.capture(*trained, step=3)
    twin = Checkpoint.capture(*trained, step=3)
    model = tiny(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.restore(model, optimizer)
    train(model, optimizer, range(3))
    assert checkpoint.equals(twin)


def test_parameters_are_the_canonical_ones_and_tied_ones_appear_once(tiny):
    model = tiny()
    checkpoint = Checkpoint.capture(model)
    assert list(checkpoint.parameters) == [name for name, _ in model.named_parameters()]
    assert "embed.weight" in checkpoint.parameters
    assert "unembed.weight" not in checkpoint.parameters


def test_buffers_that_are_not_persistent_are_restored_too(tiny):
    checkpoint = Checkpoint.capture(tiny(seed=1))
    other = tiny(seed=2)
    checkpoint.restore(other)
    assert other.scale.item() == 3.0


def test_restoring_copies_into_the_existing_parameters_and_keeps_ties(trained, tiny):
    other = tiny(seed=9)
    before = {name: id(parameter) for name, parameter in other.named_parameters(remove_duplicate=False)}
    Checkpoint.capture(*trained).restore(other)
    assert before == {
        name: id(parameter) for name, parameter in other.named_parameters(remove_duplicate=False)
    }
    assert Checkpoint.capture(other).differences(Checkpoint.capture(trained[0])) == []


def test_restoring_names_missing_unexpected_and_misshaped_tensors_and_changes_nothing(tiny):
    checkpoint = Checkpoint.capture(nn.ModuleDict({"old": nn.Linear(2, 2), "both": nn.Linear(2, 3)}))
    model = nn.ModuleDict({"both": nn.Linear(2, 4), "new": nn.Linear(1, 1)})
    before = Checkpoint.capture(model)
    with pytest.raises(ValueError, match=r"new\.weight.*old\.weight.*both\.weight is \(3, 2\).*\(4, 2\)"):
        checkpoint.restore(model)
    assert Checkpoint.capture(model).equals(before)


def test_a_dtype_that_differs_is_refused(tiny):
    with pytest.raises(ValueError, match=r"float32 in checkpoint 0, \(6, 4\) torch\.float64 in the model"):
        Checkpoint.capture(tiny()).restore(tiny().double())


def test_nothing_is_restored_when_the_optimizer_does_not_fit(trained, tiny):
    checkpoint = Checkpoint.capture(*trained)
    model = tiny(seed=5)
    before = Checkpoint.capture(model)
    with pytest.raises(ValueError, match="group 0 holds"):
        checkpoint.restore(model, torch.optim.AdamW([model.embed.weight]))
    assert Checkpoint.capture(model).equals(before)


def test_an_optimizer_of_another_model_is_refused(tiny):
    model, copy = tiny(), tiny()
    optimizer = torch.optim.SGD(copy.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"holds a parameter .* that the model does not have"):
        Checkpoint.capture(model, optimizer)
    with pytest.raises(ValueError, match=r"holds a parameter .* that the model does not have"):
        Checkpoint.capture(copy, optimizer).restore(model, optimizer)


def test_restoring_an_optimizer_or_scheduler_that_was_not_captured_is_refused(trained):
    model, optimizer = trained
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="holds no optimizer state"):
        Checkpoint.capture(model).restore(model, optimizer)
    with pytest.raises(ValueError, match="holds no scheduler state"):
        Checkpoint.capture(model, optimizer).restore(model, optimizer, scheduler)


def test_a_step_below_zero_is_refused(tiny):
    with pytest.raises(ValueError, match="step=-1"):
        Checkpoint.capture(tiny(), step=-1)


def test_a_fresh_optimizer_keeps_learning_rate_and_decay_and_drops_moments(trained):
    checkpoint = Checkpoint.capture(*trained, step=3)
    fresh = checkpoint.with_fresh_optimizer()
    assert fresh.optimizer.state == {}
    assert fresh.optimizer.groups[0]["lr"] == 0.05
    assert all(name.startswith("optimizer/state/") for name in fresh.differences(checkpoint))
    assert checkpoint.optimizer.state["embed.weight"]["step"] == 3
    bare = Checkpoint.capture(trained[0]).with_fresh_optimizer()
    assert (bare.optimizer.groups, bare.optimizer.state) == ((), {})  # the recipe says the rest


def test_random_state_replays_dropout_and_gives_the_callers_generators_back(tiny):
    def draws():
        numpy_draw = np.random.random()  # noqa: NPY002
        return [torch.rand(3).tolist(), random.random(), numpy_draw, model(tokens).tolist()]

    model, tokens = tiny(), torch.arange(6)
    random.gauss(0, 1)  # leaves half a pair behind, which belongs to the state
    checkpoint = Checkpoint.capture(model)
    first, gauss = draws(), random.gauss(0, 1)
    callers = Checkpoint.capture(model)
    with checkpoint.random_state():
        assert draws() == first
        assert random.gauss(0, 1) == gauss
    assert Checkpoint.capture(model).rng_differences(callers) == []
    assert draws() != first


def test_the_callers_generators_come_back_after_an_exception(tiny):
    checkpoint = Checkpoint.capture(tiny())
    torch.rand(1)
    callers = Checkpoint.capture(tiny())

    def fail() -> None:
        with checkpoint.random_state():
            torch.rand(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert Checkpoint.capture(tiny()).rng_differences(callers) == []


def test_a_checkpoint_without_generators_only_gives_the_callers_back(tiny):
    from dataclasses import replace

    captured = Checkpoint.capture(tiny())
    with replace(captured, rng=None).random_state():
        inside = torch.rand(2)
    assert Checkpoint.capture(tiny()).rng_differences(captured) == []
    assert torch.equal(torch.rand(2), inside)


def test_differences_see_nan_as_itself_and_zero_apart_from_minus_zero():
    nan = torch.tensor([float("nan")])
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, payload)
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    assert same_bits(torch.arange(4.0).reshape(2, 2).t(), torch.tensor([[0.0, 2.0], [1.0, 3.0]]))


def test_moving_a_checkpoint_leaves_step_counts_where_torch_keeps_them(trained):
    moved = Checkpoint.capture(*trained).to("meta")
    state = moved.optimizer.state["embed.weight"]
    assert moved.parameters["embed.weight"].is_meta
    assert moved.buffers["scale"].is_meta
    assert state["exp_avg"].is_meta
    assert state["step"].device.type == "cpu"


def test_the_fingerprint_names_the_numeric_environment(tiny):
    fingerprint = Checkpoint.capture(tiny()).fingerprint
    assert fingerprint["torch"] == torch.__version__
    assert fingerprint["threads"] == str(torch.get_num_threads())
    assert fingerprint["device"] == "cpu"
    assert {"cpu_capability", "machine", "deterministic", "matmul_precision"} <= set(fingerprint)
    assert all(isinstance(value, str) for value in fingerprint.values())


# --- other settings ---------------------------------------------------------------------------------------


def two_groups(model):
    return torch.optim.AdamW(
        [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}], lr=0.1
    )


def test_other_settings_are_those_of_every_group_or_of_each():
    model = nn.Linear(2, 1)
    checkpoint = Checkpoint.capture(model, two_groups(model), step=3)
    changed = checkpoint.with_settings(lr=0.2, weight_decay=[0.3, 0.4], betas=(0.5, 0.6))
    found = [(g["params"], g["lr"], g["weight_decay"], g["betas"]) for g in changed.optimizer.groups]
    assert found == [(["weight"], 0.2, 0.3, (0.5, 0.6)), (["bias"], 0.2, 0.4, (0.5, 0.6))]
    assert [g["lr"] for g in checkpoint.optimizer.groups] == [0.1, 0.1]
    assert changed.step == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 0.9}, "group 0 has no 'momentum'; it has lr, betas"),
        ({"lr": [0.1]}, "lr= lists 1 values, and there are 2 groups"),
    ],
)
def test_settings_that_the_groups_do_not_have_are_refused(settings, message):
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=message):
        Checkpoint.capture(model, two_groups(model)).with_settings(**settings)
    with pytest.raises(ValueError, match="holds no optimizer's groups to set lr in"):
        Checkpoint.capture(model).with_settings(lr=0.1)
