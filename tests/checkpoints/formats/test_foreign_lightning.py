"""Checkpoints from Lightning's files."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from checkpoints import Checkpoint, Trajectory, TrajectoryError
from tests.zoo.foreign_files import W


def trainers_file(model, optimizers=(), schedulers=(), step=3, **more):
    """What a Lightning Trainer saves, without one; tests/cli has real ones."""
    return {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer_states": [optimizer.state_dict() for optimizer in optimizers],
        "lr_schedulers": [scheduler.state_dict() for scheduler in schedulers],
        **more,
    }


def two_groups(model):
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    return torch.optim.AdamW([{"params": vectors[::-1], "lr": 0.05}, {"params": matrices}])


GROUPINGS = {
    "one group": (lambda model: torch.optim.AdamW(model.parameters()), lambda model: None),
    "momentum": (lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), lambda model: None),
    "those that train": (
        lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        lambda model: None,
    ),
    "two groups": (two_groups, two_groups),
    "named groups": (
        lambda model: torch.optim.AdamW(
            [
                {
                    "params": [
                        (f"model.{n}", p) for n, p in reversed(list(model.named_parameters())) if p.ndim == 1
                    ]
                },
                {
                    "params": [(f"model.{n}", p) for n, p in model.named_parameters() if p.ndim == 2],
                    "lr": 0.1,
                },
            ]
        ),
        lambda model: None,
    ),
}


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_optimizer_and_scheduler_come_under_the_models_names(tmp_path, tiny, train, grouping):
    build, hint = GROUPINGS[grouping]
    model, other = tiny(), tiny(seed=7)
    optimizer = build(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4])
    train(model, optimizer, range(3), scheduler)
    torch.save(trainers_file(model, [optimizer], [scheduler]), tmp_path / "last.ckpt")
    run = Trajectory.from_lightning(
        tmp_path, tmp_path / "run", prefix="model.", model=other, optimizer=hint(other)
    )
    expected = Checkpoint.capture(model, optimizer, scheduler, step=3)
    different = run.at(3).differences(expected)
    assert different == ["buffers/scale"]  # which the other seed's model lent
    restored = build(other)
    run.at(3).restore(other, restored, torch.optim.lr_scheduler.MultiStepLR(restored, [9]))
    assert restored.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_a_file_of_weights_alone_has_no_optimizer(tmp_path, tiny):
    saved = trainers_file(tiny(), step=9)
    del saved["optimizer_states"], saved["lr_schedulers"]
    torch.save(saved, tmp_path / "weights.ckpt")
    checkpoint = Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.").at(9)
    assert (checkpoint.optimizer, checkpoint.scheduler) == (None, None)


def test_an_optimizer_begins_at_step_zero(tmp_path, tiny):
    model = tiny()
    torch.save(trainers_file(model, [two_groups(model)], step=0), tmp_path / "a.ckpt")
    run = Trajectory.from_lightning(
        tmp_path, tmp_path / "run", prefix="model.", model=model, optimizer=two_groups(model)
    )
    assert run.optimizer_starts == (0,)
    assert run.at(0).optimizer.state == {}


def optimizer_of(parameters):
    return torch.optim.AdamW(list(parameters))


UNCLEAR = {
    "two groups": (two_groups, None, r"numbers \[4, 2\] parameters by group, .* Give model= and optimizer="),
    "too few": (lambda m: optimizer_of([m.embed.weight]), None, "which of the 6 is which cannot be told"),
    "another optimizer": (
        two_groups,
        lambda m: optimizer_of(m.parameters()),
        r"hold \[4, 2\] parameters, .*\[6\]",
    ),
    "another order": (
        lambda m: optimizer_of(reversed(list(m.parameters()))),
        None,
        r"exp_avg for \S+ is \(\S+\), the parameter \(.*\): the order is another. Give optimizer=",
    ),
}


@pytest.mark.parametrize("why", UNCLEAR)
def test_optimizers_whose_parameters_cannot_be_told_are_refused(tmp_path, tiny, train, why):
    build, hint, message = UNCLEAR[why]
    model = tiny()
    optimizer = build(model)
    train(model, optimizer, range(2))
    torch.save(trainers_file(model, [optimizer]), tmp_path / "a.ckpt")
    settings = {"prefix": "model.", "model": model, "optimizer": hint and hint(model)}
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", **settings)


def test_names_that_torch_kept_must_be_the_models(tmp_path, tiny):
    model = tiny()
    optimizer = torch.optim.AdamW([(f"net.{name}", p) for name, p in model.named_parameters()])
    torch.save(trainers_file(model, [optimizer]), tmp_path / "a.ckpt")
    with pytest.raises(
        TrajectoryError, match=r"its optimizer holds 'net.embed.weight', .* it has 'embed.weight'"
    ):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.", model=model)


def test_an_optimizer_without_its_model_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match="give model= as well"):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", optimizer=two_groups(tiny()))


def test_several_optimizers_are_refused_and_the_weights_can_be_had(tmp_path, tiny):
    model = tiny()
    torch.save(trainers_file(model, [two_groups(model)] * 2), tmp_path / "step=3.ckpt")
    with pytest.raises(TrajectoryError, match=r"it has 2 optimizers and 0 schedulers, .* key='state_dict'"):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.")
    run = Trajectory.from_state_dicts(
        tmp_path / "step=3.ckpt", tmp_path / "run", key="state_dict", prefix="model.", model=model
    )
    assert run.steps == (3,)


def test_a_trainers_file_that_needs_more_than_weights_says_what_to_do(tmp_path, tiny):
    torch.save(
        trainers_file(tiny(), hyper_parameters={"where": Path("data"), "n": Fraction(1)}), tmp_path / "a.ckpt"
    )
    with pytest.raises(TrajectoryError, match=r"fractions.Fraction.* could run code.*\.safe_globals\(\["):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.")
    with torch.serialization.safe_globals([type(Path("data")), Fraction]):
        run = Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.", model=tiny())
    assert run.steps == (3,)


def test_a_file_that_no_trainer_wrote_is_refused(tmp_path):
    torch.save(W, tmp_path / "a.ckpt")
    with pytest.raises(
        TrajectoryError, match=r"has no 'state_dict', 'global_step', but 'w'\. .*from_state_dicts"
    ):
        Trajectory.from_lightning(tmp_path, tmp_path / "run")
