"""The manifest, files beside it, and runs of older versions."""

import json
import logging

import pytest

from checkpoints import Trajectory, TrajectoryError, TrajectoryWriter, store
from tests.zoo.older_runs import as_schema_1


def test_files_beside_the_checkpoints_are_listed_and_their_damage_is_found(run):
    with TrajectoryWriter.resume(run) as writer:
        writer.write_file("metrics.csv", b"step\n1\n")
        writer.write_file("config.yaml", b"a: 1\n")
        writer.write_file("metrics.csv", b"step\n1\n2\n")
    trajectory = Trajectory.open(run)
    assert trajectory.files == ("metrics.csv", "config.yaml")
    assert trajectory.read_file("metrics.csv") == b"step\n1\n2\n"
    assert trajectory.verify() == []
    (run / "metrics.csv").write_bytes(b"step\n1\n3\n")
    (problem,) = trajectory.verify()
    assert "metrics.csv is damaged or was edited" in problem
    (run / "metrics.csv").unlink()
    with pytest.raises(TrajectoryError, match=r"metrics\.csv cannot be read"):
        trajectory.read_file("metrics.csv")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("stopped_at", [0, 1, 2])
def test_a_file_that_was_being_replaced_when_its_writer_died_is_old_or_new_and_well(
    run, monkeypatch, stopped_at, first
):
    """Three writes: the manifest with both checksums, the file, the manifest with the new one."""
    if not first:
        with TrajectoryWriter.resume(run) as writer:
            writer.write_file("metrics.csv", b"old")
    real, calls = store.files.write_atomically, []

    def dies(path, data):
        calls.append(path)
        if len(calls) > stopped_at:
            raise KeyboardInterrupt
        real(path, data)

    writer = TrajectoryWriter.resume(run)
    with monkeypatch.context() as patch:
        patch.setattr(store.files, "write_atomically", dies)
        with pytest.raises(KeyboardInterrupt):
            writer.write_file("metrics.csv", b"new")
    writer.close()
    trajectory = Trajectory.open(run)
    assert trajectory.verify() == []
    if stopped_at == 2 or not first:
        assert trajectory.read_file("metrics.csv") == (b"new" if stopped_at == 2 else b"old")
    with TrajectoryWriter.resume(run) as writer:
        writer.write_file("metrics.csv", b"newest")
    assert Trajectory.open(run).read_file("metrics.csv") == b"newest"


def test_a_file_that_is_not_listed_is_read_and_said_to_be_unchecked(run, caplog):
    (run / "notes.txt").write_bytes(b"mine")
    with caplog.at_level(logging.WARNING):
        assert Trajectory.open(run).read_file("notes.txt") == b"mine"
    assert "notes.txt is not listed in the manifest and is unchecked" in caplog.messages[0]


def test_a_run_of_schema_1_opens_says_that_it_is_unchecked_and_grows(run, small, caplog):
    as_schema_1(run)
    with caplog.at_level(logging.WARNING):
        trajectory = Trajectory.open(run)
    assert "unchecked" in caplog.text
    assert not trajectory.sealed
    assert (trajectory.steps, trajectory.config) == ((0, 10, 20), {"seed": 3, "betas": (0.9, 0.95)})
    assert trajectory.verify() == []
    before = (run / "manifest.json").read_bytes()
    TrajectoryWriter.resume(run).close()
    assert (run / "manifest.json").read_bytes() == before
    with TrajectoryWriter.resume(run) as writer:
        writer.append(small(30))
        writer.append(small(40))
    grown = Trajectory.open(run)
    assert (grown.sealed, grown.steps, grown.config) == (True, (0, 10, 20, 30, 40), trajectory.config)
    assert grown.verify() == []


def test_a_writer_that_dies_while_it_renews_an_older_run_leaves_it_as_it_was(run, small, monkeypatch):
    as_schema_1(run)
    with monkeypatch.context() as patch:

        def dies(folder, manifest):
            raise KeyboardInterrupt

        patch.setattr(store, "write_manifest", dies)
        with TrajectoryWriter.resume(run) as writer, pytest.raises(KeyboardInterrupt):
            writer.append(small(30))
    assert Trajectory.open(run).steps == (0, 10, 20)
    with TrajectoryWriter.resume(run) as writer:
        writer.append(small(30))
    assert Trajectory.open(run).steps == (0, 10, 20, 30)


def test_an_older_run_is_configured(run):
    as_schema_1(run)
    with TrajectoryWriter.resume(run) as writer:
        writer.configure({"seed": 4})
    assert (Trajectory.open(run).config, Trajectory.open(run).steps) == ({"seed": 4}, (0, 10, 20))


def test_a_manifest_whose_checksum_was_taken_out_is_no_older_one(run):
    document = json.loads((run / "manifest.json").read_text())
    del document["sha256"]
    (run / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(TrajectoryError, match="not a readable manifest"):
        Trajectory.open(run)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"schema_version": 1e999}',
        '{"schema_version": []}',
        "[]",
        "\x00",
        "9" * 5000,
    ],
)
def test_a_manifest_made_to_harm_is_refused_in_words(run, text):
    (run / "manifest.json").write_text(text)
    with pytest.raises(TrajectoryError, match="not a readable manifest"):
        Trajectory.open(run)


def test_a_listed_name_that_leads_elsewhere_is_refused(run):
    manifest = store.read_manifest(run)
    store.write_manifest(run, store.Manifest(manifest.config, manifest.provenance, files={"../x": ("0",)}))
    with pytest.raises(TrajectoryError, match="expected the name of a file beside the manifest"):
        Trajectory.open(run)


def test_the_tensor_in_which_a_checkpoint_is_damaged_is_named(run):
    weight = Trajectory.open(run).at(10).parameters["frozen.weight"]
    path = run / "trajectory/step-00000010.h5"
    image = bytearray(path.read_bytes())
    image[image.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(image)
    with pytest.raises(
        TrajectoryError, match=r"step-00000010.*The damage is in 'parameters/frozen/weight'\."
    ):
        Trajectory.open(run).at(10)
