"""A result is replaced where that is asked for, and whole: the old file or the new one."""

from __future__ import annotations

from pathlib import Path

import pytest
import xarray as xr

from dynamics import results


def numbered(number: float) -> xr.Dataset:
    return xr.Dataset({"effect": ("example", [number])})


def test_a_result_is_replaced_when_asked_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "heads.h5"
    results.save(numbered(0.0), path, overwrite=True)
    results.save(numbered(1.0), path, overwrite=True)
    assert results.load(path)["effect"].values.tolist() == [1.0]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        results.save(numbered(2.0), path)
    assert results.load(path)["effect"].values.tolist() == [1.0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["os.replace", "xarray.Dataset.to_netcdf"])
def test_the_old_result_stays_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "heads.h5"
    results.save(numbered(0.0), path)
    before = path.read_bytes()

    def fail(*arguments: object, **settings: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(place, fail)
    with pytest.raises(OSError, match="disk full"):
        results.save(numbered(1.0), path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_no_file_can_hold_does_not_cost_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "heads.h5"
    results.save(numbered(0.0), path)
    with pytest.raises(ValueError, match="attribute 'odd'"):
        results.save(numbered(1.0).assign_attrs(odd=[1]), path, overwrite=True)
    assert results.load(path)["effect"].values.tolist() == [0.0]


def test_hdf5_itself_never_writes_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is full it crashes the interpreter."""
    opened = []
    real = results.files.files.write_atomically

    def note(path: Path, data: bytes) -> None:
        opened.append((path, len(data), list(tmp_path.iterdir())))
        real(path, data)

    monkeypatch.setattr(results.files.files, "write_atomically", note)
    results.save(numbered(0.0), tmp_path / "heads.h5")
    assert opened == [(tmp_path / "heads.h5", (tmp_path / "heads.h5").stat().st_size, [])]
