"""Results keep their labels, units and provenance, in memory and on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr

from dynamics import results
from dynamics.results import provenance_json
from tests.zoo.small_results import SITES, build, with_measures


def test_effect_is_patched_minus_base_for_every_site_and_measure() -> None:
    for dataset in (build(), with_measures()):
        by_hand = dataset["patched"] - dataset["base"]
        xr.testing.assert_equal(dataset["effect"], by_hand.transpose(*dataset["effect"].dims))
        assert dataset["effect"].dims[-2:] == ("example", "site")


def test_sites_without_a_layer_or_head_have_minus_one_as_int64() -> None:
    dataset = build()
    assert dataset["head"].dtype == np.int64
    assert dataset["head"].values.tolist() == [-1, 0, 1]
    assert dataset["layer"].values.tolist() == [-1, 0, 0]
    bare = build(site_coords={"site": ["a", "b", "c"]})
    assert bare["head"].dtype == bare["layer"].dtype == np.int64
    assert set(bare["head"].values.tolist()) == {-1}
    assert bare["level"].values.tolist() == ["", "", ""]


def test_each_measure_keeps_its_own_units() -> None:
    assert results.units(build(), "effect") == "logits"
    dataset = with_measures()
    assert results.units(dataset, "effect") == ""
    assert results.units(dataset.sel(measure="logit"), "effect") == "logits"
    assert results.units(dataset.sel(measure="probability"), "base") == "1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patched": np.zeros((3, 2))}, r"patched has shape \(3, 2\); expected \(2, 3\)"),
        ({"references": {"base": np.zeros(2)}}, "lack .*source"),
        (
            {"references": {"base": np.zeros(3), "source": np.zeros(2)}},
            r"base has shape \(3,\); expected \(2,\)",
        ),
        ({"references": {"base": np.zeros(2), "source": np.zeros(2), "gap": np.zeros(2)}}, "'gap'"),
        ({"site_coords": {"site": ["a", "b", "a"]}}, "more than once: .*'a'"),
        ({"site_coords": {"layer": [0, 0, 0]}}, "lack the labels 'site'"),
        ({"site_coords": {**SITES, "head": [0]}}, "'head' has length 1; 'site' has 3"),
        ({"site_coords": {**SITES, "head": [[0], [1], [2]]}}, "'head' holds"),
        ({"units": ["logits", "1"]}, "found 2 units"),
        ({"provenance": "[1]"}, "expected a JSON object"),
    ],
)
def test_effects_that_do_not_fit_are_refused_with_what_was_found(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    "dataset", [build(), with_measures(), with_measures().isel(measure=0, example=0, site=[0])]
)
def test_a_saved_dataset_comes_back_identical_with_the_same_dtypes(
    dataset: xr.Dataset, tmp_path: Path
) -> None:
    dataset = dataset.assign_attrs(confidence=0.95, n_runs=3, note="")
    dataset["patched"][..., 0] = np.nan
    before = dataset.copy(deep=True)
    results.save(dataset, tmp_path / "folder" / "heads.h5")
    loaded = results.load(tmp_path / "folder" / "heads.h5")
    xr.testing.assert_identical(loaded, before)
    xr.testing.assert_identical(dataset, before)
    for name, array in before.variables.items():  # a string is as wide as the longest that is left
        found = loaded.variables[name].dtype
        assert found == array.dtype or (found.kind == array.dtype.kind == "U")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["heads.h5"]


def test_a_loaded_dataset_is_in_memory_and_its_file_is_free(tmp_path: Path) -> None:
    path = tmp_path / "heads.h5"
    results.save(build(), path)
    loaded = results.load(path)
    path.unlink()
    xr.testing.assert_identical(loaded, build())
    results.save(loaded, path)
    xr.testing.assert_identical(results.load(path), build())


def test_h5py_reads_the_numbers_and_there_are_no_fill_values(tmp_path: Path) -> None:
    results.save(build(), tmp_path / "heads.h5")
    with h5py.File(tmp_path / "heads.h5") as file:
        np.testing.assert_array_equal(file["effect"][()], build()["effect"].values)
        assert file["head"].dtype == np.int64
        assert [text.decode() for text in file["site"][()]] == SITES["site"]
        assert not [name for name in file if "_FillValue" in file[name].attrs]


def test_an_existing_result_is_never_overwritten(tmp_path: Path) -> None:
    results.save(build(0), tmp_path / "heads.h5")
    with pytest.raises(FileExistsError, match="not overwritten"):
        results.save(build(1), tmp_path / "heads.h5")
    xr.testing.assert_identical(results.load(tmp_path / "heads.h5"), build(0))


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.save(build(), tmp_path / "heads.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [True, None, {"a": 1}, [1, 2]])
def test_attributes_that_a_file_would_change_are_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attribute 'odd' of the dataset"):
        results.save(build().assign_attrs(odd=value), tmp_path / "heads.h5")
    nested = build()
    nested["effect"].attrs["odd"] = value
    with pytest.raises(ValueError, match="attribute 'odd' of 'effect'"):
        results.save(nested, tmp_path / "heads.h5")
    assert list(tmp_path.iterdir()) == []


def test_a_multiindex_is_refused_by_name(tmp_path: Path) -> None:
    indexed = build().drop_vars("site").rename_dims(site="place").set_index(place=["layer", "head"])
    with pytest.raises(ValueError, match=r"reset_index\('place'\)"):
        results.save(indexed, tmp_path / "heads.h5")


def test_provenance_holds_the_facts_versions_and_a_utc_date() -> None:
    facts = json.loads(results.provenance(seed=np.int64(3), config=Path("a.yaml"), lr=np.array([0.5])))
    assert (facts["seed"], facts["config"], facts["lr"]) == (3, "a.yaml", [0.5])
    assert facts["versions"]["numpy"] == np.__version__
    assert {"torch", "xarray", "lightning", "transformer_lens"} <= set(facts["versions"])
    assert facts["date"].endswith("+00:00")
    with pytest.raises(ValueError, match=r"\['date'\]"):
        results.provenance(date="today")
    with pytest.raises(TypeError, match="is object"):
        results.provenance(model=object())


def test_provenance_names_the_commit_of_the_code_or_stays_silent() -> None:
    folder = Path(results.__file__).parent.parent
    git = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    facts = json.loads(results.provenance())
    if git.returncode == 0:
        assert facts["commit"] == git.stdout.strip()
        assert isinstance(facts["modified"], bool)
    else:
        assert "commit" not in facts


def test_provenance_needs_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    provenance_json._commit.cache_clear()
    assert "commit" not in json.loads(results.provenance())
    provenance_json._commit.cache_clear()


@pytest.mark.slow
def test_importing_results_and_statistics_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, dynamics.results, dynamics.statistics; "
        "sys.exit(', '.join({'torch', 'matplotlib', 'lightning', 'transformer_lens'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
