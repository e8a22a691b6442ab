"""The pages of the API and the gallery run, and leave no public name and no figure out."""

import re
import warnings

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
    names = {}
    for i, code in enumerate(blocks):
        exec(compile(code, f"getting-started.md, block {i}", "exec"), names)
    assert not [v for v in dy.steps.verify(names["recipe"], names["run"], names["batch_of"]) if v.differences]
    assert names["grid"].sizes["source_step"] == 2


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
