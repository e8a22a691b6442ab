"""The pages of the API and the gallery run, and leave no public name and no figure out."""

import functools
import re
import warnings

import numpy as np
import pytest

import checkpoints
import dynamics as dy
from tests.end_to_end import notebooks


def shown(code: list[str], module: str) -> set[str]:
    """The names of a module that examples use."""
    return set(re.findall(rf"\b{module}\.(\w+)", "\n".join(code)))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["api/dynamics.md", "api/checkpoints.md", "gallery.md"])
def test_every_example_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notebooks.run(page)


@pytest.mark.slow
def test_getting_started_runs_on_a_model_of_ones_own_from_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (notebooks.DOCS / "getting-started.md").read_text()
    blocks = notebooks.BLOCK.findall(page.partition("## On your own model")[2])
    assert len(blocks) == 6
    names, found = {}, {}
    for verb in ("patch_gradients", "patch_updates", "patch_signals", "patch_factors", "attribute_step"):
        monkeypatch.setattr(dy, verb, kept(found, getattr(dy, verb)))
    for i, code in enumerate(blocks):
        exec(compile(code, f"getting-started.md, block {i}", "exec"), names)
    assert not [v for v in dy.steps.verify(names["recipe"], names["run"], names["batch_of"]) if v.differences]
    places = [site.label for site in names["places"]]
    for verb, result in found.items():
        assert result["site"].values.tolist() == (places if verb == "patch_signals" else ["encoder", "head"])
    assert all(r[name].notnull().all() for r in found.values() for name in set(r) & {"effect", "attribution"})
    assert len(found) == 5
    assert names["grid"].sizes["source_step"] == 2
    assert all(names[name]["effect"].notnull().all() for name in ("carried", "flowing", "grid"))
    assert names["divided"]["attribution"].notnull().all()
    account = names["account"]
    assert set(account["source"].values) == {"0", "1", "2", "before", "decay"}
    written = account["attribution"].sum(("step", "source", "site")) + account["residual"].sum("step")
    change = account["value"].isel(step=-1) - account["value"].isel(step=0)
    np.testing.assert_allclose(written, change, rtol=1e-4)


def kept(found, verb):
    """The verb, whose results are kept by its name."""

    @functools.wraps(verb)
    def run(*given, **settings):
        found[verb.__name__] = verb(*given, **settings)
        return found[verb.__name__]

    return run


def test_every_public_name_has_an_example_and_its_reference():
    for page, module, alias in (
        ("api/dynamics.md", dy, "dy"),
        ("api/checkpoints.md", checkpoints, "checkpoints"),
    ):
        used = shown(notebooks.cells(page), alias)
        documented = set(
            re.findall(rf"auto\w+:: {module.__name__}\.(\w+)", (notebooks.DOCS / page).read_text())
        )
        from_checkpoints = set(checkpoints.__all__) if module is dy else set()
        assert set(module.__all__) - used - from_checkpoints == set(), "names without an example"
        modules = {
            n for n in module.__all__ if n.islower() and getattr(module, n).__class__.__name__ == "module"
        }
        assert set(module.__all__) - documented - from_checkpoints - modules == set(), (
            "names without a reference"
        )


def test_every_figure_is_in_the_gallery():
    functions = {name for name in dy.plots.__all__ if name.islower()}
    assert functions - {"save"} == shown(notebooks.cells("gallery.md"), r"dy\.plots") - {"save"}


def test_tutorials_are_notebooks_whose_code_parses():
    pages = sorted((notebooks.DOCS / "tutorials").glob("*.md"))
    assert len(pages) == 8
    for page in pages:
        for code in notebooks.cells(f"tutorials/{page.name}"):
            compile(code, page.name, "exec")
