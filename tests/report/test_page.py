"""What is on the page: sections a run has data for, strict data, one file without a reference to anywhere."""

import json
import re

import pytest

from dynamics import report
from dynamics.report.page import checks, content, sections, slider
from dynamics.report.runs import open_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(reported):
    return [open_run(folder) for folder in reported]


@pytest.fixture(scope="module")
def page(runs):
    return report.html(runs)


def titles(found):
    return [section["title"] for section in found["sections"]]


def data(text):
    """The data in the text of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


@pytest.mark.slow
def test_a_run_with_everything_has_every_section(runs):
    assert titles(content(runs)) == [section.title for section in sections(runs)]
    assert len(titles(content(runs))) == 11


def test_a_section_without_data_is_absent(runs, own):
    assert "Over runs" not in titles(content(runs[:1]))
    assert titles(content([open_run(own)])) == ["Where it is: maps of sites", "Provenance"]


def test_the_slider_goes_through_checkpoints_and_the_steps_of_maps(runs):
    assert slider(runs[0], []) == [0, 3, 7, 10, 57]
    assert content(runs)["steps"] == [0, 3, 7, 10, 57]


def test_the_ten_checks_are_found_by_their_site(runs):
    (asked,) = checks(runs[0].results)
    assert (asked["site"], len(asked["checks"])) == ("attn 0", 10)
    assert asked["checks"][3] == {"name": "check 3", "verdict": "holds", "figure": "+3.0 logit"}


def test_every_picture_says_what_makes_it_from_the_shell_or_in_python(runs):
    figures = [figure for section in content(runs)["sections"] for figure in section["figures"]]
    assert len(figures) > 15
    assert all(figure["title"] and figure["says"] and figure["python"] for figure in figures)
    shown = "\n".join(line for figure in figures for line in figure["commands"])
    for command in ("study", "compare", "account", "transfer", "sweep", "plot", "believe"):
        assert f"dynamics {command} " in shown


def test_what_is_held_and_not_drawn_is_listed_as_such(runs):
    *_, provenance = content(runs)["sections"]
    table = provenance["figures"][0]["data"]
    places = dict(zip(table["dims"]["file"], table["variables"]["on this page"]["values"], strict=True))
    assert places["results/odd.h5"] == "listed only"
    assert sum(said == "drawn" for said in places.values()) == len(places) - 1


@pytest.mark.slow
def test_the_page_holds_its_data_in_order_and_names_no_other_address(page, runs):
    assert data(page) == content(runs)
    assert list(data(page)["phases"]) == ["pretrain", "x1", "x2", "end"]
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert set(re.findall(r"https?://[^\"')\s]+", page)) == {"http://www.w3.org/2000/svg"}


def test_labels_are_text_and_never_markup(runs, tmp_path):
    hostile = type(runs[0])(**{**vars(runs[0]), "folder": tmp_path / "</script><img src=x onerror=alert(1)>"})
    text = report.html([hostile])
    assert "<img" not in text
    assert text.count("</script>") == 2


def test_a_report_is_written_whole_and_replaced_only_when_asked(own, tmp_path):
    out = tmp_path / "new" / "report.html"
    assert report.write([own], out) == out
    before = out.read_text()
    with pytest.raises(FileExistsError, match="--overwrite"):
        report.write([own], out)
    assert report.write([str(own)], str(out), overwrite=True) == out
    assert out.read_text() == before
    assert len(before) < 100_000
