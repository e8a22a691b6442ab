"""The index of a trajectory grows by appending, survives a cut, and shows damage."""

import json
import os
from dataclasses import replace

import pytest

from checkpoints import Trajectory, TrajectoryError, TrajectoryWriter, files, index, store


def flipped(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


def test_an_append_adds_a_line_and_leaves_what_is_there(run, small):
    path, manifest = run / index.INDEX, run / "manifest.json"
    before = path.read_bytes(), manifest.read_bytes(), manifest.stat().st_ino, path.stat().st_ino
    with TrajectoryWriter.resume(run) as writer:
        writer.append(small(30))
        assert path.read_bytes().startswith(before[0])
        assert path.read_bytes().count(b"\n") == before[0].count(b"\n") + 1
        assert (manifest.read_bytes(), manifest.stat().st_ino, path.stat().st_ino) == before[1:]
    assert path.stat().st_ino == before[3]


def test_an_append_of_the_thousandth_writes_as_much_as_of_the_tenth(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "trajectory").mkdir()
    end, lengths = index.write(tmp_path, ()), []
    for step in range(10, 1010):
        entry = index.Entry(step, f"trajectory/step-{step:08d}.h5", "0" * 64, 1000, False)
        before, end = end.length, index.append(tmp_path, entry, end)
        lengths.append(end.length - before)
    assert lengths[-1] - lengths[0] == len("1009") - len("10")
    assert len(index.read(tmp_path)[0]) == 1000


def test_a_line_cut_short_anywhere_counts_for_nothing_and_the_rest_opens_and_goes_on(run, small):
    """What a kill in the middle of an append leaves, at each of its bytes."""
    path, manifest = run / index.INDEX, run / "manifest.json"
    whole, counted = path.read_bytes(), manifest.read_bytes()
    with TrajectoryWriter.resume(run) as writer:
        writer.append(small(30))
    grown = path.read_bytes()
    manifest.write_bytes(counted)  # a killed writer does not close
    for length in range(len(whole), len(grown) - 1):
        path.write_bytes(grown[:length])
        assert Trajectory.open(run).steps == (0, 10, 20)
    for length in (len(whole), len(whole) + 1, len(grown) - 2):
        path.write_bytes(grown[:length])
        manifest.write_bytes(counted)
        with TrajectoryWriter.resume(run) as writer:
            assert writer.steps == (0, 10, 20)
            writer.append(small(30))
        assert path.read_bytes() == grown
    manifest.write_bytes(counted)
    path.write_bytes(whole + b"\0" * 200)  # as a loss of power may leave it
    assert Trajectory.open(run).steps == (0, 10, 20)


def test_a_line_that_lost_its_newline_alone_is_whole_and_is_gone_on_from(run, small):
    path = run / index.INDEX
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert Trajectory.open(run).steps == (0, 10, 20)
    with TrajectoryWriter.resume(run) as writer:
        writer.append(small(30))
    assert Trajectory.open(run).steps == (0, 10, 20, 30)
    assert Trajectory.open(run).verify() == []


def test_every_flipped_bit_of_index_and_manifest_is_an_error_that_names_the_file(run):
    for path in (run / index.INDEX, run / "manifest.json"):
        whole = path.read_bytes()
        for bit in range(0, len(whole) * 8, 41):
            path.write_bytes(flipped(whole, bit))
            with pytest.raises(TrajectoryError, match=path.name):
                Trajectory.open(run)
        path.write_bytes(whole)


def test_a_flipped_bit_in_the_last_newline_is_not_taken_for_a_line_cut_short(run):
    path = run / index.INDEX
    whole = path.read_bytes()
    for bit in range(len(whole) * 8 - 8, len(whole) * 8):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(TrajectoryError, match="damaged in line 4"):
            Trajectory.open(run)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[:2] + lines[3:],
        lambda lines: [lines[0], lines[2], lines[1], lines[3]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: lines[1:],
        lambda lines: [],
    ],
)
def test_lines_left_out_moved_or_doubled_are_damage(run, edit):
    path = run / index.INDEX
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(TrajectoryError, match=r"index\.jsonl is damaged in line"):
        Trajectory.open(run)


def rewritten(run, edit):
    """The lines of an index, edited and sealed again: by somebody, not by accident."""
    path, checksum, lines = run / index.INDEX, "", b""
    for n, line in enumerate(path.read_bytes().splitlines()):
        document = json.loads(line[: line.rindex(b', "sha256"')] + b"}")
        edit(n, document)
        sealed, checksum = files.sealed(json.dumps(document), checksum)
        lines += sealed + b"\n"
    path.write_bytes(lines)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda n, line: line.update(file="../secret.h5") if n == 1 else None,
            "line 2.*expected trajectory/NAME",
        ),
        (
            lambda n, line: line.update(file="/etc/x.h5") if n == 1 else None,
            "line 2.*expected trajectory/NAME",
        ),
        (lambda n, line: line.pop("bytes") if n == 2 else None, "damaged in line 3"),
        (lambda n, line: line.update(step=5) if n else None, "two checkpoints are of one step"),
        (
            lambda n, line: line.update(schema_version=7) if not n else None,
            "version 7; this version reads up to 1",
        ),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(run, edit, message):
    rewritten(run, edit)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(run)


def test_a_missing_index_is_not_an_empty_run(run):
    (run / index.INDEX).unlink()
    with pytest.raises(TrajectoryError, match=r"index\.jsonl cannot be read"):
        Trajectory.open(run)


def test_an_index_of_a_closed_writer_that_lost_its_end_is_noticed_wherever_it_was_cut(run):
    path = run / index.INDEX
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TrajectoryError, match=r"index\.jsonl.*(has lost its end|damaged in line)"):
            Trajectory.open(run)
    path.write_bytes(whole.splitlines(keepends=True)[0])
    with pytest.raises(TrajectoryError, match="names 0 checkpoints, the manifest 3 or more"):
        TrajectoryWriter.create(run, {})
    with pytest.raises(TrajectoryError, match="names 0 checkpoints, the manifest 3 or more"):
        TrajectoryWriter.resume(run)


def uncounted(run):
    """As a writer that was killed before it closed leaves a run."""
    store.write_manifest(run, replace(store.read_manifest(run), n_checkpoints=0))


def test_an_index_of_a_killed_writer_that_lost_lines_is_noticed_by_verify_and_not_written_over(run):
    uncounted(run)
    path = run / index.INDEX
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    (problem,) = Trajectory.open(run).verify()
    assert "3 checkpoints are there that trajectory/index.jsonl does not name" in problem
    with pytest.raises(TrajectoryError, match="already holds a run"):
        TrajectoryWriter.create(run, {})


def test_whoever_resumes_a_killed_writers_run_counts_its_checkpoints(run):
    uncounted(run)
    TrajectoryWriter.resume(run).close()
    assert store.read_manifest(run).n_checkpoints == 3


def test_a_full_disk_at_closing_costs_the_count_alone(run, small, monkeypatch):
    writer = TrajectoryWriter.resume(run)
    writer.append(small(30))

    def full(folder, manifest):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_manifest", full)
        writer.close()
    assert Trajectory.open(run).steps == (0, 10, 20, 30)
    TrajectoryWriter.resume(run).close()


@pytest.mark.parametrize("change", [{"step": 0}, {"step": -1}, {"bytes": -1}])
def test_numbers_that_no_checkpoint_has_are_damage(run, change):
    entries, _ = index.read(run)
    index.write(run, [*entries[:-1], replace(entries[-1], **change)])
    with pytest.raises(TrajectoryError, match=r"index\.jsonl is damaged in line"):
        Trajectory.open(run)


def test_a_pipe_in_place_of_a_checkpoint_is_not_waited_for(run):
    entry = index.read(run)[0][-1]
    (run / entry.file).unlink()
    os.mkfifo(run / entry.file)
    with pytest.raises(TrajectoryError, match=entry.file):
        Trajectory.open(run).at(entry.step)
