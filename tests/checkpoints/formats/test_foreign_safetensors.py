"""Checkpoints from safetensors and Hugging Face folders, and back into files."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from checkpoints import Checkpoint, Trajectory, TrajectoryError
from checkpoints.values import differences
from tests.zoo.foreign_files import W, mixed, stored


def test_safetensors_are_kept_bit_for_bit(tmp_path):
    for step in (1, 20):
        save_file(mixed(step), tmp_path / f"model-{step}.safetensors")
    run = Trajectory.from_safetensors(tmp_path, tmp_path / "run")
    assert run.steps == (1, 20)
    assert run.verify() == []
    for step in run.steps:
        found = stored(run, step)
        assert differences({name: found[name] for name in mixed()}, mixed(step)) == []
    run.export(20, tmp_path / "again-20.safetensors")
    assert (
        differences(
            load_file(tmp_path / "again-20.safetensors"), load_file(tmp_path / "model-20.safetensors")
        )
        == []
    )


def test_what_save_model_wrote_of_tied_tensors_is_read(tmp_path, tiny):
    model = tiny(seed=4)
    save_model(model, str(tmp_path / "m_4.safetensors"))
    run = Trajectory.from_safetensors(tmp_path, tmp_path / "run", model=tiny(seed=4))
    assert run.at(4).differences(Checkpoint.capture(model, step=4)) == []


def revision(folder, state, form):
    """A revision in one of the forms that `save_pretrained` has had."""
    folder.mkdir(parents=True)
    names = list(state)
    halves = [{n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]}]
    stem, suffix, save = (
        ("model", "safetensors", save_file) if "safe" in form else ("pytorch_model", "bin", torch.save)
    )
    if "shards" in form:
        shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": half for i, half in enumerate(halves)}
        weight_map = {name: shard for shard, half in shards.items() for name in half}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        shards = {f"{stem}.{suffix}": state}
    for shard, held in shards.items():
        save(held, folder / shard)


@pytest.mark.parametrize("form", ["safetensors", "safetensors shards", "bin", "bin shards"])
def test_revisions_of_every_form_are_read(tmp_path, form):
    for step in (0, 1000):
        revision(tmp_path / "suite" / f"step{step}", mixed(step), form)
    run = Trajectory.from_huggingface(tmp_path / "suite", ["step1000", "step0"], tmp_path / "run")
    assert run.steps == (0, 1000)
    found = stored(run, 1000)
    assert differences({name: found[name] for name in mixed()}, mixed(1000)) == []
    sources = run.provenance["imported"]["sources"]
    assert [source["name"].split("@")[1] for source in sources] == ["step0", "step1000"]
    assert len(sources[0]["files"]) == (2 if "shards" in form else 1)


def test_a_revision_may_be_loaded_by_a_function_of_its_folder(tmp_path, tiny):
    for step in (1, 2):
        revision(tmp_path / "suite" / f"step{step}", tiny(seed=step).state_dict(), "bin")
    asked = []

    def load(folder):
        asked.append(folder.name)
        return tiny(seed=int(folder.name[4:]))

    run = Trajectory.from_huggingface(tmp_path / "suite", ["step1", "step2"], tmp_path / "run", load=load)
    assert set(asked) == {"step1", "step2"}
    for step in (1, 2):
        assert run.at(step).differences(Checkpoint.capture(tiny(seed=step), step=step)) == []
    assert run.provenance["imported"]["lent"] == ["scale"]


def test_names_that_a_hugging_face_model_declares_harmless_are_left_out(tmp_path):
    model = nn.Linear(2, 2)
    model._keys_to_ignore_on_load_unexpected = [r"attention\.bias"]
    state = {**model.state_dict(), "layers.0.attention.bias": torch.ones(2)}
    torch.save(state, tmp_path / "m_1.pt")
    run = Trajectory.from_state_dicts(tmp_path / "m_1.pt", tmp_path / "run", model=model)
    assert run.provenance["imported"]["left_out"] == ["layers.0.attention.bias"]
    assert list(run.at(1).parameters) == ["weight", "bias"]


def test_a_repository_is_fetched_one_revision_after_another_safetensors_first(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns[0]))
        folder = tmp_path / revision
        if allow_patterns[0] == "pytorch_model.bin":
            torch.save(mixed(int(revision[4:])), folder / "pytorch_model.bin")
        folder.mkdir(exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    run = Trajectory.from_huggingface("EleutherAI/pythia-70m", ["step1", "step512"], tmp_path / "run")
    assert run.steps == (1, 512)
    assert asked == [
        ("EleutherAI/pythia-70m", name, file)
        for name in ("step1", "step512")
        for file in ("model.safetensors", "pytorch_model.bin")
    ]
    assert run.provenance["imported"]["sources"][1]["name"] == "EleutherAI/pythia-70m@step512"


def test_a_revision_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no network\nand a page of advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        TrajectoryError, match=r"'a/b' is no folder here, .*'step1' could not be .*: no network$"
    ):
        Trajectory.from_huggingface("a/b", "step1", tmp_path / "run")
    revision(tmp_path / "suite/step1", W, "bin")
    (tmp_path / "suite/step2").mkdir()
    for wanted, message in (
        ("step3", r"has no folder 'step3'; it has 'step1', 'step2'"),
        ("step2", r"holds no weights: expected model.safetensors or pytorch_model.bin"),
        ("main", r"'main' does not say its step"),
    ):
        with pytest.raises(TrajectoryError, match=message):
            Trajectory.from_huggingface(tmp_path / "suite", [wanted], tmp_path / "run")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "not a readable index"),
        ('{"weight_map": {"w": "../other.bin"}}', "not files beside it"),
        ('{"weight_map": {"w": "absent.bin"}}', r"absent\.bin is not readable"),
    ],
)
def test_an_index_of_shards_is_not_believed_blindly(tmp_path, index, message):
    (tmp_path / "suite/step1").mkdir(parents=True)
    (tmp_path / "suite/step1/pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.from_huggingface(tmp_path / "suite", ["step1"], tmp_path / "run")


def test_what_is_not_installed_is_said_by_the_call_that_needs_it(tmp_path, monkeypatch):
    save_file(W, tmp_path / "m_1.safetensors")
    torch.save(W, tmp_path / "m_1.pt")
    for package in ("safetensors", "safetensors.torch", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    run = Trajectory.from_state_dicts(tmp_path / "m_1.pt", tmp_path / "run")
    for call in (
        lambda: Trajectory.from_safetensors(tmp_path / "m_1.safetensors", tmp_path / "other"),
        lambda: run.export(1, tmp_path / "new.safetensors"),
        lambda: Trajectory.from_huggingface("a/b", ["step1"], tmp_path / "other"),
    ):
        with pytest.raises(TrajectoryError, match=r"is needed: pip install (safetensors|huggingface_hub)"):
            call()


def test_any_run_can_be_exported(run, tmp_path):
    Trajectory.open(run).export(10, tmp_path / "model.pt")
    checkpoint = Trajectory.open(run).at(10)
    back = torch.load(tmp_path / "model.pt", weights_only=True)
    assert differences(back, {**checkpoint.parameters, **checkpoint.buffers}) == []


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(run, tmp_path):
    trajectory = Trajectory.open(run)
    (tmp_path / "model.pt").write_bytes(b"mine")
    for step, name, message in (
        (10, "model.pt", "is there already, and nothing is overwritten"),
        (11, "new.pt", "Step 11 is not stored"),
        (10, "new.bin", r"ends in neither \.pt nor \.safetensors"),
    ):
        with pytest.raises(TrajectoryError, match=message):
            trajectory.export(step, tmp_path / name)
    assert (tmp_path / "model.pt").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "run"]


def test_what_safetensors_cannot_hold_is_said(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path / "m_1.pt")
    run = Trajectory.from_state_dicts(tmp_path / "m_1.pt", tmp_path / "run")
    with pytest.raises(TrajectoryError, match=r"safetensors cannot hold it: .*complex128; a \.pt file can"):
        run.export(1, tmp_path / "model.safetensors")
    run.export(1, tmp_path / "model.pt")
