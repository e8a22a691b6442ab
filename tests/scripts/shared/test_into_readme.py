"""Pages are written between their marks alone."""

import numpy as np
import pytest

from scripts.shared import into_readme


def test_the_readme_is_replaced_between_its_marks_alone(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    marks = "<!-- seeds: begin -->\n{}\n<!-- seeds: end -->\n"
    readme.write_text(f"before\n{marks.format('old')}after\n<!-- loop: begin -->\n<!-- loop: end -->\n")
    monkeypatch.setattr(into_readme, "HOME", tmp_path)
    into_readme.write("seeds", "new")
    assert (
        readme.read_text()
        == f"before\n{marks.format('new')}after\n<!-- loop: begin -->\n<!-- loop: end -->\n"
    )


def test_a_table_goes_into_the_page_that_has_its_marks(tmp_path, monkeypatch):
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "README.md").write_text("nothing\n")
    page = tmp_path / "docs" / "deep" / "found.md"
    page.write_text("<!-- loop: begin -->\n<!-- loop: end -->\n")
    monkeypatch.setattr(into_readme, "HOME", tmp_path)
    into_readme.write("loop", "new")
    assert page.read_text() == "<!-- loop: begin -->\nnew\n<!-- loop: end -->\n"
    assert (tmp_path / "README.md").read_text() == "nothing\n"
    assert into_readme.beside("loop.png") == tmp_path / ".readme" / "loop.png"


def test_marks_that_no_page_or_two_pages_have_are_refused(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- loop: begin -->\n<!-- loop: end -->\n")
    (tmp_path / "docs" / "page.md").write_text("<!-- loop: begin -->\n<!-- loop: end -->\n")
    monkeypatch.setattr(into_readme, "HOME", tmp_path)
    with pytest.raises(ValueError, match=r"README\.md, docs/page\.md; expected them in one page"):
        into_readme.write("loop", "new")
    with pytest.raises(ValueError, match="in no page"):
        into_readme.write("seeds", "new")


def test_a_bootstrap_interval_never_leaves_the_range_of_its_values():
    mean, low, high = into_readme.bootstrap_interval([1.0] * 11 + [0.4])
    assert low < mean < high <= 1.0
    assert into_readme.bootstrapped([1.0, 1.0, 1.0]) == "1.00 [1.00, 1.00]"
    assert into_readme.bootstrapped([]) == "–"


@pytest.mark.slow
def test_bootstrap_intervals_of_twelve_skewed_shares_cover_nine_times_in_ten():
    draws = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        _, low, high = into_readme.bootstrap_interval(draws.beta(6, 1, 12))
        covered.append(low <= 6 / 7 <= high)
    assert 0.84 < np.mean(covered) < 0.97


def test_an_interval_of_correlations_stays_between_them_and_one():
    assert into_readme.correlation_interval([0.5, 0.5, 0.5]) == "+0.50 [+0.50, +0.50]"
    low, high = bounds(into_readme.correlation_interval([0.1, 0.2, 0.9, 0.97]))
    assert -1 <= low < 0.1
    assert 0.9 < high <= 1


def test_intervals_of_twelve_correlations_cover_nineteen_times_in_twenty():
    draws = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        runs = [
            np.corrcoef(draws.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 21).T)[0, 1]
            for _ in range(12)
        ]
        low, high = bounds(into_readme.correlation_interval(runs))
        covered.append(low <= 0.6 <= high)
    assert 0.92 < np.mean(covered) < 0.98


def bounds(said):
    return map(float, said[said.index("[") + 1 : -1].split(", "))
