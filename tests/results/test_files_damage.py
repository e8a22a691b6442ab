"""Files of results that are damaged, of other versions, or made to harm: noticed before a number is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from dynamics import results
from dynamics.results import ResultsError
from dynamics.results.files import _SEAL_BYTES


@pytest.fixture
def dataset() -> xr.Dataset:
    generator = np.random.default_rng(0)
    return xr.Dataset(
        {
            "effect": (("example", "site"), generator.normal(size=(3, 2)), {"units": "logits"}),
            "kept": ("site", np.array([True, False])),
            "n": ((), 7),
            "none": ("nothing", np.zeros(0)),
        },
        coords={"site": ["L0H0", "L0H1 ü"], "label": (("example", "site"), np.full((3, 2), "x"))},
        attrs={"provenance": "{}", "seed": 3},
    )


@pytest.fixture
def path(dataset: xr.Dataset, tmp_path: Path) -> Path:
    results.save(dataset, tmp_path / "r.h5")
    return tmp_path / "r.h5"


def unsealed(path: Path, edit: Callable[[h5py.File], object]) -> None:
    """Changed, and left with neither checksum nor schema: a file of an older version."""
    path.write_bytes(path.read_bytes()[:-_SEAL_BYTES])
    with h5py.File(path, "r+") as file:
        del file.attrs["results_schema"]
        edit(file)


def test_a_sealed_file_comes_back_identical_and_other_programs_read_it(dataset, path):
    xr.testing.assert_identical(results.load(path), dataset)
    assert results.verify(path)
    assert xr.load_dataset(path)["effect"].equals(dataset["effect"])
    with h5py.File(path) as file:
        assert file["effect"].fletcher32
        assert (file["effect"][...] == dataset["effect"].values).all()


def test_every_flipped_bit_and_every_cut_is_an_error_that_names_the_file(dataset, path):
    whole = path.read_bytes()
    generator = np.random.default_rng(1)
    spread = generator.integers(0, len(whole) * 8, 150)
    for bit in [*spread, *range((len(whole) - _SEAL_BYTES) * 8, len(whole) * 8, 29)]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(ResultsError, match=str(path)):
            results.load(path)
    for length in [0, 1, *generator.integers(0, len(whole), 40), len(whole) - _SEAL_BYTES, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ResultsError, match=str(path)):
            results.load(path)


def test_a_file_of_an_older_version_opens_and_says_that_it_is_unchecked(dataset, tmp_path, caplog):
    encoding = {name: {"_FillValue": None} for name in dataset.variables}
    dataset.to_netcdf(tmp_path / "old.h5", engine="h5netcdf", encoding=encoding)
    with caplog.at_level(logging.WARNING):
        read = results.load(tmp_path / "old.h5")
    xr.testing.assert_identical(read, dataset)
    (said,) = caplog.messages
    assert "old.h5" in said
    assert "unchecked" in said
    assert not results.verify(tmp_path / "old.h5")


def test_a_newer_version_is_refused_naming_both(path):
    unsealed(path, lambda file: file.attrs.create("results_schema", [9]))
    with pytest.raises(ResultsError, match=r"schema version 9; this version reads up to 1\. Update"):
        results.load(path)


def replaced(**settings: object) -> Callable[[h5py.File], object]:
    def edit(file: h5py.File) -> None:
        del file["n"]
        file.create_dataset("n", **settings)

    return edit


def linked(link: object) -> Callable[[h5py.File], object]:
    def edit(file: h5py.File) -> None:
        del file["n"]
        file["n"] = link

    return edit


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((2,), dtype="f8")
    layout[...] = h5py.VirtualSource("/etc/passwd", "w", (2,), dtype="f8")
    file.create_virtual_dataset("v", layout)


def shared_text(file: h5py.File) -> None:
    """A thousand texts that are the same bytes."""
    file.create_dataset("t", data=["x" * 300_000] + [""] * 999, dtype=h5py.string_dtype())
    start, length = file["t"].id.get_offset(), file["t"].id.get_storage_size()
    file.flush()
    path = Path(file.filename)
    raw = bytearray(path.read_bytes())
    raw[start : start + length] = raw[start : start + 16] * 1000
    file.close()
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (replaced(shape=(2,), dtype="f8", external="/etc/passwd"), "'n' keeps its data outside"),
        (virtual, "'v' keeps its data outside"),
        (linked(h5py.ExternalLink("/etc/passwd", "/w")), "'n' leads through a link"),
        (linked(h5py.SoftLink("/effect")), "'n' leads through a link"),
        (lambda file: file.create_group("inner"), "'inner' is a Group"),
        (replaced(data=np.zeros(9), compression="gzip"), r"'n' has filters \[1\]"),
        (replaced(shape=(1 << 40,), chunks=(1 << 20,), dtype="f4"), "'n' holds fewer bytes"),
        (replaced(shape=(1 << 40,), dtype="f4"), "'n' holds fewer bytes"),
        (replaced(shape=(4,), dtype=h5py.ref_dtype), "'n' is of type object"),
        (replaced(shape=(4,), dtype=h5py.vlen_dtype("f8")), "'n' is of type object"),
        (replaced(data=np.zeros(4, dtype=[("a", "f8")])), "'n' is of type"),
        (
            lambda file: file["effect"].attrs.create("a", np.array(["x", "y"], "O")),
            "'effect@a' holds 2 texts",
        ),
        (lambda file: file.attrs.create("r", file["n"].ref, dtype=h5py.ref_dtype), "'@r' is of type object"),
        (shared_text, "'t' holds texts that are longer together than the file"),
    ],
)
def test_a_file_that_points_outside_itself_or_swells_is_refused_before_it_is_read(
    path, edit, message, monkeypatch
):
    monkeypatch.setattr(xr, "load_dataset", None)
    unsealed(path, edit)
    with pytest.raises(ResultsError, match=message):
        results.load(path)


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_plain_file_is_refused_at_once(path, put):
    path.unlink()
    put(path)
    with pytest.raises(ResultsError, match=r"r\.h5 is no plain file"):
        results.load(path)


def test_a_run_s_results_do_not_lead_out_of_its_folder(path, tmp_path):
    run = tmp_path / "run"
    (run / "results").mkdir(parents=True)
    assert results.files_of(run) == []
    (run / "results" / "own.h5").write_bytes(path.read_bytes())
    (run / "results" / "again.h5").symlink_to("own.h5")
    assert [found.name for found in results.files_of(run)] == ["again.h5", "own.h5"]
    (run / "results" / "odd.h5").symlink_to(path)
    with pytest.raises(ResultsError, match=r"odd\.h5 leads out of the run's folder, to .*r\.h5"):
        results.files_of(run)


def test_a_folder_of_results_that_is_a_link_out_of_the_run_is_refused(path, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ResultsError, match="leads out"):
        results.files_of(tmp_path / "run")
