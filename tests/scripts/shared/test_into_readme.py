"""The README is written between its marks alone."""

from scripts.shared import into_readme


def test_the_readme_is_replaced_between_its_marks_alone(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    marks = "<!-- seeds: begin -->\n{}\n<!-- seeds: end -->\n"
    readme.write_text(f"before\n{marks.format('old')}after\n<!-- loop: begin -->\n<!-- loop: end -->\n")
    monkeypatch.setattr(into_readme, "README", readme)
    into_readme.write("seeds", "new")
    assert (
        readme.read_text()
        == f"before\n{marks.format('new')}after\n<!-- loop: begin -->\n<!-- loop: end -->\n"
    )
