"""A model's own names, whatever was put around it."""

import warnings

import pytest
import torch
from torch import nn

from checkpoints import Checkpoint, Trajectory
from checkpoints.wrappers import own_name
from tests.zoo.cases import first_quick


def plain():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].eval()
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


WRAPPERS = {
    "compiled": compiled,
    "a part compiled": compiled_inside,
    "parallel": nn.DataParallel,
    "compiled, then parallel": lambda model: nn.DataParallel(compiled(model)),
    "parallel, then compiled": lambda model: compiled(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrapper", first_quick(sorted(WRAPPERS, key=lambda name: "compiled" in name)))
def test_what_a_wrapped_model_is_captured_as_fits_the_plain_one_and_back(wrapper):
    wrapped = WRAPPERS[wrapper](plain())
    optimizer = torch.optim.AdamW(wrapped.parameters())
    (wrapped(torch.ones(5, 3)) ** 2).sum().backward()
    optimizer.step()
    found = Checkpoint.capture(wrapped, optimizer)
    expected = plain()
    assert list(found.parameters) == [name for name, _ in expected.named_parameters()]
    assert list(found.buffers) == [name for name, _ in expected.named_buffers()]
    assert found.evaluating == ("1",)
    assert found.optimizer.groups[0]["params"] == list(found.parameters)
    again = torch.optim.AdamW(expected.parameters())
    found.restore(expected, again)
    assert Checkpoint.capture(expected, again).differences(found) == []
    fresh = WRAPPERS[wrapper](plain())
    found.restore(fresh, torch.optim.AdamW(fresh.parameters()))
    assert Checkpoint.capture(fresh, step=0).parameters.keys() == found.parameters.keys()
    assert torch.equal(Checkpoint.capture(fresh).parameters["2.weight"], found.parameters["2.weight"])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("given_model", [True, False])
def test_imported_state_dicts_of_wrapped_models_have_the_models_own_names(wrapper, given_model, tmp_path):
    wrapped = WRAPPERS[wrapper](plain())
    torch.save(wrapped.state_dict(), tmp_path / "model_7.pt")
    run = Trajectory.from_state_dicts(
        tmp_path / "model_7.pt", tmp_path / "run", model=plain() if given_model else None
    )
    expected = plain().state_dict()
    found = run.at(7)
    assert {**found.parameters, **found.buffers}.keys() == expected.keys()
    assert all(torch.equal(found.parameters[name], expected[name]) for name in found.parameters)


def test_a_model_that_has_a_submodule_called_module_keeps_its_names(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = plain()

    torch.save(Own().state_dict(), tmp_path / "model_7.pt")
    run = Trajectory.from_state_dicts(tmp_path / "model_7.pt", tmp_path / "run", model=Own())
    assert "module.0.weight" in run.at(7).parameters
    assert "module.0.weight" in Checkpoint.capture(Own()).parameters


def test_parametrisations_keep_the_names_that_torch_gives_them():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    names = list(Checkpoint.capture(model).parameters)
    assert names == ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"]
    assert own_name("a._orig_mod.b") == "a.b"
    assert own_name("a._orig_modes.b") == "a._orig_modes.b"


def test_sharded_tensors_are_gathered():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
            expected = {name: p.detach().clone() for name, p in model.named_parameters()}
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            optimizer = torch.optim.AdamW(model.parameters())
            found = Checkpoint.capture(model, optimizer)
        finally:
            destroy_process_group()
    assert type(found.parameters["0.weight"]) is torch.Tensor
    assert all(torch.equal(found.parameters[name], tensor) for name, tensor in expected.items())
