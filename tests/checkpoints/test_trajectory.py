"""Reading a run: what was stored comes back, and what is damaged or no run is noticed."""

import json
import os
import time

import numpy as np
import pytest
import torch

from checkpoints import Checkpoint, Trajectory, TrajectoryError, TrajectoryWriter
from tests.zoo.older_runs import as_schema_1


def edit_manifest(run, edit):
    """Change a manifest of schema version 1, which has no checksum."""
    document = as_schema_1(run)
    edit(document)
    (run / "manifest.json").write_text(json.dumps(document))


def test_what_was_appended_comes_back_bit_for_bit(tmp_path, trained):
    checkpoint = Checkpoint.capture(*trained, step=12)
    with TrajectoryWriter.create(tmp_path / "run", {}) as writer:
        writer.append(checkpoint)
    read = Trajectory.open(tmp_path / "run").at(12)
    assert read.differences(checkpoint) == []
    assert read.rng_differences(checkpoint) == []


def test_a_run_folder_has_the_promised_layout_and_may_hold_other_files(tmp_path, small, files):
    (tmp_path / "config.yaml").write_text("a: 1")
    with TrajectoryWriter.create(tmp_path, {}) as writer:
        writer.append(small(10))
    assert files(tmp_path) == [
        ".writer.lock",
        "config.yaml",
        "manifest.json",
        "trajectory/index.jsonl",
        "trajectory/step-00000010.h5",
    ]


def test_steps_are_sorted_however_they_were_appended(tmp_path, small):
    with TrajectoryWriter.create(tmp_path, {}) as writer:
        for step in (20, 0, 10):
            writer.append(small(step))
        assert writer.steps == (0, 10, 20)
    trajectory = Trajectory.open(tmp_path)
    assert trajectory.steps == (0, 10, 20)
    assert len(trajectory) == 3
    assert trajectory.last.step == 20


def test_steps_are_found_exactly_nearest_and_before(run):
    trajectory = Trajectory.open(run)
    assert trajectory.path == run
    assert trajectory.at(10).step == 10
    assert [trajectory.nearest(step).step for step in (-5, 5, 6, 99)] == [0, 0, 10, 20]
    assert [trajectory.before(step).step for step in (0, 9, 10, 99)] == [0, 0, 10, 20]
    with pytest.raises(TrajectoryError, match="no checkpoint at step -1 or before; its first is 0"):
        trajectory.before(-1)
    with pytest.raises(TrajectoryError, match=r"Step 11 is not stored .* nearest that are: 0, 10, 20\."):
        trajectory.at(11)


def test_of_many_steps_the_two_on_either_side_are_named(tmp_path, small):
    with TrajectoryWriter.create(tmp_path / "long", {}) as writer:
        for step in range(0, 80, 10):
            writer.append(small(step))
    with pytest.raises(TrajectoryError, match=r"the nearest that are: 20, 30, 40, 50\. \.steps lists all 8"):
        Trajectory.open(tmp_path / "long").at(35)


def test_the_config_comes_back_with_its_tuples_and_is_a_copy(run):
    trajectory = Trajectory.open(run)
    assert trajectory.config == {"seed": 3, "betas": (0.9, 0.95)}
    trajectory.config["seed"] = 4
    assert trajectory.config["seed"] == 3


def test_new_optimizers_are_known_without_reading_checkpoints(run):
    (run / "trajectory/step-00000000.h5").unlink()
    assert Trajectory.open(run).optimizer_starts == (0,)


def test_a_folder_that_is_no_run_says_so_and_what_a_run_looks_like(tmp_path, files):
    with pytest.raises(
        TrajectoryError, match=r"is no run: it has no manifest\.json\. A run is a folder with"
    ):
        Trajectory.open(tmp_path)
    with pytest.raises(TrajectoryError, match="is no run: there is no such folder"):
        Trajectory.open(tmp_path / "absent")
    with pytest.raises(TrajectoryError, match="is no run"):
        TrajectoryWriter.resume(tmp_path)
    assert files(tmp_path) == []


def test_a_run_without_checkpoints_says_so(tmp_path):
    TrajectoryWriter.create(tmp_path, {}).close()
    trajectory = Trajectory.open(tmp_path)
    assert len(trajectory) == 0
    for read in (lambda: trajectory.last, lambda: trajectory.at(0), lambda: trajectory.nearest(0)):
        with pytest.raises(TrajectoryError, match="a run without checkpoints"):
            read()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda document: document.update(schema_version=99), "schema version 99; .* Update the package"),
        (lambda document: document.pop("config"), "not a readable manifest"),
        (lambda document: document["checkpoints"][0].update(file="../secret.h5"), "expected trajectory/NAME"),
        (lambda document: document["checkpoints"][0].pop("sha256"), "not a readable manifest"),
    ],
)
def test_a_manifest_that_cannot_be_followed_is_refused(run, edit, message):
    edit_manifest(run, edit)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(run)


def test_a_manifest_that_is_cut_short_is_refused(run):
    path = run / "manifest.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(TrajectoryError, match="not a readable manifest"):
        Trajectory.open(run)


def test_every_flipped_bit_is_noticed(run):
    path = run / "trajectory/step-00000010.h5"
    image = path.read_bytes()
    for position in np.random.default_rng(1).integers(0, len(image) * 8, 40):
        damaged = bytearray(image)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(TrajectoryError, match="sha256 is not the one in the manifest"):
            Trajectory.open(run).at(10)
        with pytest.raises(TrajectoryError, match="sha256"):
            Trajectory.open(run).tensor(10, "embed.weight")


def test_verify_says_what_is_wrong_with_which_step(run):
    assert Trajectory.open(run).verify() == []
    folder = run / "trajectory"
    (folder / "step-00000000.h5").unlink()
    shortened = (folder / "step-00000010.h5").read_bytes()[:-1]
    (folder / "step-00000010.h5").write_bytes(shortened)
    (folder / "step-00000020.h5").write_bytes(b"\0" * (folder / "step-00000020.h5").stat().st_size)
    missing, short, zeroed = Trajectory.open(run).verify()
    assert missing.startswith("step 0: ")
    assert "cannot be read" in missing
    assert f"{len(shortened)} bytes" in short
    assert "sha256" in zeroed


def test_a_file_under_another_steps_name_is_noticed(run):
    def swap(document):
        first, second = document["checkpoints"][:2]
        first["step"], second["step"] = second["step"], first["step"]

    edit_manifest(run, swap)
    with pytest.raises(TrajectoryError, match="holds step 10, the manifest says 0"):
        Trajectory.open(run).at(0)


def test_one_tensor_is_read_without_the_others(run):
    trajectory = Trajectory.open(run)
    whole = trajectory.at(10)
    moment = whole.optimizer.state["embed.weight"]["exp_avg"]
    path = run / "trajectory/step-00000010.h5"
    image = bytearray(path.read_bytes())
    start = image.index(moment.numpy().tobytes())
    image[start] ^= 1
    path.write_bytes(image)  # after the file was verified; what is not read is not seen
    assert torch.equal(trajectory.tensor(10, "embed.weight"), whole.parameters["embed.weight"])
    assert torch.equal(trajectory.tensor(10, "scale", "buffers"), whole.buffers["scale"])
    assert torch.equal(
        trajectory.tensor(10, "embed.weight", "exp_avg_sq"),
        whole.optimizer.state["embed.weight"]["exp_avg_sq"],
    )
    with pytest.raises(TrajectoryError, match="not a readable checkpoint"):
        trajectory.tensor(10, "embed.weight", "exp_avg")


def test_a_tensor_that_is_not_there_lists_those_that_are(run):
    trajectory = Trajectory.open(run)
    with pytest.raises(TrajectoryError, match=r"no tensor 'W_E' of the kind 'parameters'; .*embed\.weight"):
        trajectory.tensor(10, "W_E")
    with pytest.raises(TrajectoryError, match="it has 0 of that kind"):
        trajectory.tensor(10, "embed.weight", "momentum_buffer")


@pytest.mark.slow
def test_two_hundred_checkpoints_open_in_a_fifth_of_a_second(tmp_path, monkeypatch, small):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with TrajectoryWriter.create(tmp_path, {}) as writer:
        for step in range(200):
            writer.append(small(step))
    began = time.perf_counter()
    trajectory = Trajectory.open(tmp_path)
    assert len(trajectory.steps) == 200
    assert time.perf_counter() - began < 0.2
