"""The page in a real browser: what it shows is what the Datasets say, and everybody can use it.

Needs chromium, as Debian's package installs it; skipped where there is none, but not in continuous integration.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

from dynamics import report, results, statistics
from dynamics.report.page import sections
from dynamics.report.runs import open_run
from tests.zoo import reported_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ,
        reason="there is no chromium here; apt-get install chromium (in continuous integration this fails)",
    ),
]


@dataclass
class Opened:
    """A page in the browser, its figures as they were made, and all that went wrong or was asked for."""

    page: Page
    figures: list[report.Figure]
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def draw_all(self) -> None:
        """Go through the page, as pictures are drawn when they come into sight."""
        for i in range(len(self.figures)):
            figure = self.page.locator("figure").nth(i)
            figure.scroll_into_view_if_needed()
            figure.locator(".picture > *").first.wait_for()

    def figure(self, kind: str):
        """The first figure of a kind, in sight."""
        found = self.page.locator(f'figure[data-kind="{kind}"]').first
        found.scroll_into_view_if_needed()
        found.locator(".picture > *").first.wait_for()
        return found

    def move(self, place: int) -> None:
        """Move the slider."""
        self.page.locator("#step").evaluate(
            "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input')); }", place
        )


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(browser, runs, out) -> Opened:
    report.write(runs, out)
    opened = [open_run(run) for run in runs]
    figures = [figure for section in sections(opened) for figure in section.figures]
    page = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme="light")
    found = Opened(page, figures)
    page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(out.as_uri())
    return found


@pytest.fixture(scope="module")
def opened(browser, reported, tmp_path_factory) -> Opened:
    """The page of two runs with everything, loaded once."""
    found = open_page(browser, reported, tmp_path_factory.mktemp("report") / "report.html")
    found.draw_all()
    return found


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("–", "nan"))


def test_the_page_opens_without_an_error_and_asks_for_nothing_but_itself(opened):
    assert opened.errors == []
    assert len(opened.requests) == 1
    assert opened.page.locator("figure").count() == len(opened.figures)


def test_the_slider_moves_the_maps_numbers_to_the_datasets(opened):
    figure = opened.figure("map")
    figure.get_by_label("sites").select_option(label="heads")
    summary = statistics.summarize(reported_runs.patched(0)).sel(optimizer="fresh", measure="correct_logit")
    for place, step in ((2, 7), (3, 10), (4, 57)):
        opened.move(place)
        shown = figure.locator("table.map").first.locator(".cell")
        texts = dict(
            zip(shown.evaluate_all("c => c.map(e => e.dataset.site)"), shown.all_inner_texts(), strict=True)
        )
        assert len(texts) == 4
        for site, text in texts.items():
            assert number(text) == pytest.approx(float(summary["effect"].sel(step=step, site=site)), abs=6e-3)
    assert "step 57, x2 step 50" in opened.page.locator("#step-words").inner_text()


def test_a_cell_says_all_that_is_known_of_it(opened):
    figure = opened.figure("map")
    figure.get_by_label("sites").select_option(label="components")
    summary = statistics.summarize(reported_runs.patched(0)).sel(
        optimizer="fresh", measure="correct_logit", site="attn 0", step=7
    )
    words = figure.locator('.cell[data-site="attn 0"]').first.get_attribute("aria-label")
    assert words.startswith("attn 0, step 7, effect ")
    assert "logit" in words
    assert "n 4, p 0." in words
    for name in ("p", "q", "placebo", "effect_low", "effect_high"):
        assert f"{float(summary[name]):.3g}".replace("-", "−") in words


def test_a_cell_opens_its_sites_curve_and_checks_and_gives_the_focus_back(opened):
    figure = opened.figure("map")
    figure.get_by_label("sites").select_option(label="components")
    cell = figure.locator('.cell[data-site="attn 0"]').first
    cell.click()
    detail = figure.locator(".detail")
    assert detail.locator("svg[role=img]").count() == 1
    assert detail.locator("li b", has_text="holds").count() == 10
    detail.get_by_role("button", name="Close").click()
    assert detail.is_hidden()
    assert cell.evaluate("cell => cell === document.activeElement")


def test_the_arrow_keys_go_from_cell_to_cell_and_one_of_them_is_a_tab_stop(opened):
    figure = opened.figure("map")
    figure.get_by_label("sites").select_option(label="components")
    cells = figure.locator(".cell[data-site]")
    cells.first.focus()
    opened.page.keyboard.press("ArrowDown")
    assert opened.page.evaluate("document.activeElement.dataset.site") == "mlp 0"
    opened.page.keyboard.press("ArrowRight")
    assert "mlp 0, step 10" in opened.page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert cells.evaluate_all("all => all.filter(c => c.tabIndex === 0).length") == 1


def test_a_table_sorts_and_finds(opened):
    figure = opened.page.locator("figure", has=opened.page.get_by_role("heading", name="Each alias")).first
    after = figure.get_by_role("button", name="accuracy after")

    def column() -> list[str]:
        place = after.evaluate("b => b.closest('th').cellIndex")
        return figure.locator(f"tbody tr > :nth-child({place + 1})").all_inner_texts()

    after.click()
    rising = list(map(number, column()))
    assert rising == sorted(rising)
    assert len(set(rising)) > 1
    after.click()
    assert list(map(number, column())) == rising[::-1]
    assert figure.locator('th[aria-sort="descending"]').count() == 1
    files = opened.page.locator(
        "figure", has=opened.page.get_by_role("heading", name="Files of results")
    ).first
    files.get_by_role("searchbox").fill("compare")
    assert files.locator("tbody tr").count() == 4
    files.get_by_role("searchbox").fill("")


def test_the_csv_of_every_picture_is_its_dataset(opened):
    for i, figure in enumerate(opened.figures):
        with opened.page.expect_download() as begun:
            opened.page.locator("figure").nth(i).locator("button.save").click()
        saved = pd.read_csv(
            io.BytesIO(begun.value.path().read_bytes()), keep_default_na=False, na_values=[""]
        )
        expected = results.tidy(
            figure.dataset.drop_vars(
                [name for name, coord in figure.dataset.coords.items() if coord.ndim == 0]
            )
        )
        assert set(saved) == set(map(str, expected.columns)), figure.title
        for name in saved:
            if pd.api.types.is_numeric_dtype(expected[name]):
                np.testing.assert_allclose(saved[name].astype(float), expected[name], rtol=1e-6)
            else:
                assert saved[name].fillna("").astype(str).tolist() == expected[name].astype(str).tolist()


def test_the_lines_under_every_picture_run(opened):
    blocks = opened.page.locator("figure").evaluate_all(
        "all => all.map(f => [...f.querySelectorAll('.below pre code')].pop().textContent)"
    )
    assert len(blocks) == len(opened.figures)
    for block in dict.fromkeys(blocks):
        exec(compile(block, block, "exec"), {})


@pytest.mark.parametrize("width", [400, 1600])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.page.set_viewport_size({"width": width, "height": 900})
    opened.draw_all()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    wide = opened.page.locator("svg[role=img]").evaluate_all(
        "all => all.filter(e => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert wide == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(opened, scheme):
    opened.page.set_viewport_size({"width": 1000, "height": 900})
    opened.page.emulate_media(color_scheme=scheme)
    opened.draw_all()
    found = Axe().run(opened.page, options={"resultTypes": ["violations"]})
    serious = [v for v in found.response["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], v["nodes"][0]["html"]) for v in serious] == []
    assert opened.errors == []


def test_on_paper_there_are_no_controls_and_every_picture_is_drawn(opened):
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    opened.page.emulate_media(media="print")
    assert opened.page.locator("header").is_hidden()
    assert opened.page.locator(".picture:empty").count() == 0
    assert opened.page.locator("details[open] pre").count() >= len(opened.figures)
    opened.page.emulate_media(media="screen")
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")


def test_a_run_of_ones_own_with_one_result_opens(browser, own, tmp_path):
    found = open_page(browser, [own], tmp_path / "report.html")
    found.draw_all()
    assert found.errors == []
    cells = found.page.locator("table.map .cell")
    assert list(map(number, cells.all_inner_texts())) == [2.0, 3.0]
