"""What training leaves as it is lies once in a trajectory, comes back to the bit, and is not believed blindly."""

import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from checkpoints import Checkpoint, Trajectory, TrajectoryError, TrajectoryWriter, shared, store
from tests.zoo.older_runs import RUN_2

D = 40
"""40 by 40 numbers of four bytes are worth sharing, 40 are not."""


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it, and a mask."""

    def __init__(self, d=D):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.base, self.adapter = nn.Linear(d, d), nn.Linear(d, 2)
        self.base.requires_grad_(False)
        self.register_buffer("mask", torch.ones(100, 100, dtype=torch.bool).tril())

    def forward(self, x):
        return self.adapter(self.base(x))


def trained(folder, n=4, model=None):
    """A run of the adapter alone; the optimizer holds all parameters, as people make it."""
    model = model or Adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    states = []
    with TrajectoryWriter.create(folder, {}) as writer:
        for step in range(n):
            states.append(Checkpoint.capture(model, optimizer, step=step))
            writer.append(states[-1])
            optimizer.zero_grad()
            model(torch.ones(3, model.base.in_features)).pow(2).mean().backward()
            optimizer.step()
    return states


@pytest.fixture
def adapted(tmp_path):
    trained(tmp_path / "run")
    return tmp_path / "run"


def shared_file(run, which=0):
    return run / shared.names(run)[which]


def size(run):
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file())


def test_frozen_weights_and_masks_are_one_file_each_and_come_back_to_the_bit(tmp_path):
    states = trained(tmp_path / "run")
    run = Trajectory.open(tmp_path / "run")
    assert len(shared.names(run.path)) == 2
    assert run.verify() == []
    for state in states:
        assert run.at(state.step).equals(state)
        assert run.at(state.step).frozen == ("base.weight", "base.bias")
    assert torch.equal(run.tensor(2, "base.weight"), states[2].parameters["base.weight"])
    assert torch.equal(run.tensor(2, "mask", "buffers"), states[2].buffers["mask"])


def test_many_checkpoints_of_an_adapter_take_little_more_than_one_model_and_the_adapters(tmp_path):
    n, model = 20, Adapted(1000)
    trained(tmp_path / "run", n, model)
    adapters = n * 3 * sum(p.nbytes for p in model.adapter.parameters())
    whole = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert whole + adapters / 2 < size(tmp_path / "run") < 1.3 * (whole + adapters)


def test_tensors_of_equal_bytes_are_one_file(tmp_path):
    model = Adapted()
    model.twin = nn.Linear(D, D).requires_grad_(False)
    model.twin.load_state_dict(model.base.state_dict())
    trained(tmp_path / "run", n=2, model=model)
    assert len(shared.names(tmp_path / "run")) == 2
    assert Trajectory.open(tmp_path / "run").verify() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.int64, torch.uint8])
def test_every_kind_of_number_comes_back(tmp_path, dtype):
    bits = np.random.default_rng(0).integers(0, 256, 8192, dtype=np.uint8)
    tensor = torch.from_numpy(bits).view(dtype).reshape(8, -1)
    state = replace(Checkpoint.capture(nn.Module()), buffers={"b": tensor.t()})
    with TrajectoryWriter.create(tmp_path / "run", {}) as writer:
        writer.append(state)
        writer.append(state)  # it is there already, to the bit
    assert len(shared.names(tmp_path / "run")) == 1
    assert Trajectory.open(tmp_path / "run").at(0).equals(state)


def test_a_tensor_that_changes_after_all_lies_in_the_checkpoints_from_then_on(tmp_path):
    model, states = Adapted(), []
    with TrajectoryWriter.create(tmp_path / "run", {}) as writer:
        for step in range(5):
            states.append(Checkpoint.capture(model, step=step))
            writer.append(states[-1])
            with torch.no_grad():  # as an exponential moving average is
                model.base.weight.mul_(0.9)
    assert len(shared.names(tmp_path / "run")) == 2  # the mask, and the weight as it was first
    run = Trajectory.open(tmp_path / "run")
    assert all(run.at(state.step).equals(state) for state in states)


def test_what_trains_and_what_is_small_is_not_shared(tmp_path):
    model = Adapted()
    model.base.requires_grad_(True)
    del model.mask
    trained(tmp_path / "run", model=model)
    assert shared.names(tmp_path / "run") == []


def test_a_resumed_run_names_the_same_files(adapted):
    before = shared.names(adapted)
    model = Adapted()
    with TrajectoryWriter.resume(adapted) as writer:
        writer.append(Checkpoint.capture(model, step=9))
        with pytest.raises(TrajectoryError, match="already stored"):
            writer.append(replace(Trajectory.open(adapted).at(2), buffers={}))
    assert shared.names(adapted) == before
    assert Trajectory.open(adapted).verify() == []


def test_imported_weights_share_what_the_model_says_is_frozen(tmp_path):
    model = Adapted()
    for step in range(3):
        torch.save(
            {**model.state_dict(), "adapter.bias": torch.full((2,), float(step))}, tmp_path / f"m_{step}.pt"
        )
    run = Trajectory.from_state_dicts(tmp_path, tmp_path / "run", model=model)
    assert len(shared.names(run.path)) == 2
    assert run.verify() == []
    run.export(1, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert torch.equal(back["base.weight"], model.base.weight)


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "a folder", "longer"])
def test_a_shared_tensor_that_is_not_what_was_written_is_named(adapted, harm):
    path = shared_file(adapted)
    whole = path.read_bytes()
    path.unlink()
    if harm == "a folder":
        path.mkdir()
    elif harm != "gone":
        path.write_bytes({"flipped": b"\x55" + whole[1:], "cut": whole[:-1], "longer": whole + b"\0"}[harm])
    run = Trajectory.open(adapted)
    reads = [lambda: run.at(2), lambda: [run.tensor(2, "base.weight"), run.tensor(2, "mask", "buffers")]]
    for read in reads:
        with pytest.raises(TrajectoryError, match=path.name):
            read()
    if harm != "a folder":
        assert sum(path.name in problem for problem in run.verify()) >= len(run)


def test_a_damaged_shared_tensor_is_written_anew_by_whoever_has_it(adapted):
    path = shared_file(adapted)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with TrajectoryWriter.resume(adapted) as writer:
        writer.append(Checkpoint.capture(Adapted(), step=9))
    assert path.read_bytes() == whole
    assert Trajectory.open(adapted).verify() == []


def test_damage_that_no_checkpoint_names_is_said_too(adapted):
    (adapted / shared.SHARED / ("0" * 64)).write_bytes(b"other")
    (problem,) = Trajectory.open(adapted).verify()
    assert "0" * 64 in problem


@pytest.mark.parametrize("dies_at", range(6))
def test_a_writer_that_dies_at_any_write_leaves_a_run_that_opens_and_goes_on(tmp_path, monkeypatch, dies_at):
    TrajectoryWriter.create(tmp_path / "run", {}).close()
    real, calls = store.files.write_atomically, []

    def dies(path, data):
        calls.append(path)
        if len(calls) > dies_at:
            path.with_name(f".{path.name}.x.partial").write_bytes(data[:9])
            raise KeyboardInterrupt
        real(path, data)

    state = Checkpoint.capture(Adapted())
    with monkeypatch.context() as patch:
        patch.setattr(store.files, "write_atomically", dies)
        writer = TrajectoryWriter.resume(tmp_path / "run")
        if dies_at < 3:
            with pytest.raises(KeyboardInterrupt):
                writer.append(state)
        else:
            writer.append(state)
        writer._release()
    run = Trajectory.open(tmp_path / "run")
    assert run.steps == ((0,) if dies_at >= 3 else ())
    assert run.verify() == []
    with TrajectoryWriter.resume(tmp_path / "run") as writer:
        writer.append(state)
    assert Trajectory.open(tmp_path / "run").at(0).equals(state)
    assert not list((tmp_path / "run").rglob("*.partial"))


def renamed(run, step, change):
    """A checkpoint whose references to shared tensors were edited, sealed again by somebody who can."""
    entry = next(e for e in store.read_manifest(run).entries if e.step == step)
    with h5py.File(run / entry.file, "r+") as file:
        document = json.loads(file["index"][0])
        change(document["parameters"]["base.weight"]["$tensor"])
        del file["index"]
        text = np.array([json.dumps(document).encode()])
        file.create_dataset("index", data=text, chunks=(1,), fletcher32=True)
    image = (run / entry.file).read_bytes()
    entries = [
        replace(e, sha256=store.files.sha256(image), bytes=len(image)) if e.step == step else e
        for e in store.read_manifest(run).entries
    ]
    store.index.write(run, entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda reference: reference.update(shared="../../manifest.json"), "expected its sha256"),
        (lambda reference: reference.update(shared="/etc/passwd"), "expected its sha256"),
        (lambda reference: reference.update(shared=[1]), "not a readable checkpoint"),
        (lambda reference: reference.update(shared="0" * 64), "cannot be read"),
        (lambda reference: reference.update(shape=[1 << 40]), "is damaged: 6400 bytes"),
        (lambda reference: reference.update(shape=[-1, D]), "is damaged: 6400 bytes"),
        (lambda reference: reference.update(dtype="float64"), "is damaged: 6400 bytes"),
        (lambda reference: reference.update(dtype="object"), "not a readable checkpoint"),
        (lambda reference: reference.update(shape=[D * D, "1"]), "not a readable checkpoint"),
    ],
)
def test_a_reference_made_to_harm_is_refused_in_words(adapted, change, message):
    renamed(adapted, 2, change)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(adapted).at(2)


def test_a_link_in_place_of_a_shared_tensor_gives_nothing_away(adapted, tmp_path):
    path, secret = shared_file(adapted), tmp_path / "secret"
    secret.write_bytes(b"x" * path.stat().st_size)
    path.unlink()
    path.symlink_to(secret)
    assert len(Trajectory.open(adapted).verify()) == 5
    with pytest.raises(TrajectoryError, match="sha256"):
        Trajectory.open(adapted).at(0)


def test_a_run_from_before_tensors_were_shared_opens_and_grows(tmp_path):
    run = shutil.copytree(RUN_2, tmp_path / "run")
    older = Trajectory.open(run)
    assert (older.steps, older.config, older.verify()) == ((0, 1), {"seed": 0, "betas": (0.9, 0.95)}, [])
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.5)
    older.at(1).restore(model)
    assert older.at(1).frozen == ()
    model[0].requires_grad_(False)
    model.register_buffer("mask", torch.ones(D, D))
    with TrajectoryWriter.resume(run) as writer:
        writer.append(older.at(1))
        writer.append(Checkpoint.capture(model, optimizer, step=2))
    assert Trajectory.open(run).steps == (0, 1, 2)
    assert Trajectory.open(run).verify() == []
    assert len(shared.names(run)) == 1
