"""A run that goes on from a stored checkpoint is the run that was never interrupted, bit for bit."""

from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from checkpoints import Checkpoint
from checkpoints.encoding import decode, encode

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.02),
    "adamw foreach": partial(torch.optim.AdamW, lr=0.02, foreach=True),
    "adamw with lr tensor": partial(torch.optim.AdamW, lr=torch.tensor(0.02), foreach=False),
    "amsgrad": partial(torch.optim.Adam, lr=0.02, amsgrad=True),
    "sgd": partial(torch.optim.SGD, lr=0.02),
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.02, centered=True, momentum=0.5),
    "adagrad": partial(torch.optim.Adagrad, lr=0.02, initial_accumulator_value=0.1),
    "nadam": partial(torch.optim.NAdam, lr=0.02),
    "radam": partial(torch.optim.RAdam, lr=0.02),
    "adadelta": partial(torch.optim.Adadelta, lr=0.5),
    "adamax": partial(torch.optim.Adamax, lr=0.02),
    "asgd": partial(torch.optim.ASGD, lr=0.02, t0=2),
    "rprop": partial(torch.optim.Rprop, lr=0.02),
}

SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "multi-step": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 4, 4]),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "one-cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "warm-up, then cosine": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 9)],
        [4],
    ),
}


def grouped(model, factory):
    """Two groups with different learning rates, in another order than the model's."""
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    return factory([{"params": vectors[::-1], "lr": 0.05}, {"params": matrices}])


def through_a_file(checkpoint):
    return decode(encode(checkpoint))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_continues_bitwise_like_the_uninterrupted_run(name, tiny, train):
    torch.manual_seed(0)
    model = tiny()
    optimizer = grouped(model, OPTIMIZERS[name])
    train(model, optimizer, range(4))
    stored = through_a_file(Checkpoint.capture(model, optimizer, step=4))
    train(model, optimizer, range(4, 8))
    straight = Checkpoint.capture(model, optimizer, step=8)

    model = tiny(seed=1)
    optimizer = grouped(model, OPTIMIZERS[name])
    train(model, optimizer, range(50, 52))  # state of its own, which must go
    stored.restore(model, optimizer)
    with stored.random_state():
        train(model, optimizer, range(4, 8))
        resumed = Checkpoint.capture(model, optimizer, step=8)
    assert resumed.differences(straight) == []
    assert resumed.rng_differences(straight) == []
    assert "parameters/embed.weight" in straight.differences(stored)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_optimizer_steps_bitwise_like_a_newly_built_one(name, tiny, train):
    model = tiny()
    optimizer = grouped(model, OPTIMIZERS[name])
    train(model, optimizer, range(4))
    checkpoint = Checkpoint.capture(model, optimizer, step=4)
    checkpoint.with_fresh_optimizer().restore(model, optimizer)
    with checkpoint.random_state():
        train(model, optimizer, range(4, 6))
    restored = Checkpoint.capture(model, optimizer, step=6)

    checkpoint.restore(model)
    optimizer = grouped(model, OPTIMIZERS[name])
    with checkpoint.random_state():
        train(model, optimizer, range(4, 6))
    assert Checkpoint.capture(model, optimizer, step=6).differences(restored) == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_restored_scheduler_continues_bitwise(name, tiny, train):
    torch.manual_seed(0)
    model = tiny()
    optimizer = grouped(model, OPTIMIZERS["adamw"])
    scheduler = SCHEDULERS[name](optimizer)
    train(model, optimizer, range(3), scheduler)
    stored = through_a_file(Checkpoint.capture(model, optimizer, scheduler, step=3))
    train(model, optimizer, range(3, 8), scheduler)
    straight = Checkpoint.capture(model, optimizer, scheduler, step=8)

    model = tiny(seed=1)
    optimizer = grouped(model, OPTIMIZERS["adamw"])
    scheduler = SCHEDULERS[name](optimizer)
    stored.restore(model, optimizer, scheduler)
    with stored.random_state():
        train(model, optimizer, range(3, 8), scheduler)
    assert Checkpoint.capture(model, optimizer, scheduler, step=8).differences(straight) == []


def test_state_with_lists_of_tensors_survives_storage(train):
    """LBFGS keeps lists, None and plain numbers under its first parameter."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 6))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    train(model, optimizer, range(3))
    checkpoint = Checkpoint.capture(model, optimizer)
    assert isinstance(checkpoint.optimizer.state["0.weight"]["old_dirs"], list)
    assert through_a_file(checkpoint).differences(checkpoint) == []


def test_restoring_goes_by_identity_and_not_by_the_order_of_groups(tiny, train):
    def in_order(model, reverse):
        groups = [
            {"params": [model.embed.weight, model.unembed.bias], "lr": 0.1},
            {"params": [model.norm.weight, model.norm.bias], "lr": 0.01, "weight_decay": 0.5},
        ]
        for group in groups:
            group["params"] = group["params"][:: -1 if reverse else 1]
        return torch.optim.AdamW(groups[:: -1 if reverse else 1])

    model = tiny()
    optimizer = in_order(model, reverse=False)
    train(model, optimizer, range(3))
    checkpoint = Checkpoint.capture(model, optimizer)

    other = tiny(seed=4)
    reversed_optimizer = in_order(other, reverse=True)
    checkpoint.restore(other, reversed_optimizer)
    assert [group["lr"] for group in reversed_optimizer.param_groups] == [0.01, 0.1]
    restored = Checkpoint.capture(other, reversed_optimizer)
    assert restored.optimizer.state.keys() == checkpoint.optimizer.state.keys()
    assert not [name for name in restored.differences(checkpoint) if "groups" not in name]


def test_hyperparameters_keep_their_types_through_storage(trained):
    group = through_a_file(Checkpoint.capture(*trained)).optimizer.groups[0]
    assert group["betas"] == (0.9, 0.999)
    assert isinstance(group["betas"], tuple)
    assert group["amsgrad"] is False
    assert group["foreach"] is None
    assert group["params"][0] == "embed.weight"


def test_frozen_parameters_have_no_state(trained):
    checkpoint = Checkpoint.capture(*trained)
    assert "frozen.weight" in checkpoint.parameters
    assert "frozen.weight" in checkpoint.optimizer.groups[0]["params"]
    assert "frozen.weight" not in checkpoint.optimizer.state


def test_a_group_too_many_is_refused(tiny):
    model = tiny()
    optimizer = torch.optim.SGD([{"params": [model.embed.weight]}, {"params": [model.norm.bias]}], lr=1.0)
    checkpoint = Checkpoint.capture(model, optimizer)
    with pytest.raises(ValueError, match=r"2 parameter groups, the optimizer 1; nothing takes .*norm\.bias"):
        checkpoint.restore(model, torch.optim.SGD([model.embed.weight], lr=1.0))


def test_named_parameters_may_build_the_optimizer(tiny, train):
    model = tiny()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    train(model, optimizer, range(2))
    checkpoint = Checkpoint.capture(model, optimizer)
    checkpoint.restore(model, torch.optim.AdamW(model.parameters()))
