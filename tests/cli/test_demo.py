"""`dynamics demo`: says what it shows, where it is, and what to try next."""

import pytest

from dynamics.studies import demonstration
from tests.cli.calling import succeed
from tests.studies.test_demonstration import SHORT


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    long = demonstration.demonstrate
    monkeypatch.setattr(demonstration, "demonstrate", lambda out: long(out, SHORT))


@pytest.mark.slow
def test_a_demo_says_where_its_figure_is_and_what_to_try_next(tmp_path):
    printed = succeed("demo", "--out", tmp_path / "demo")
    assert f"{tmp_path}/demo/figures/demo.png shows it. Everything is in {tmp_path}/demo." in printed
    assert f"dynamics account {tmp_path}/demo" in printed
    assert (tmp_path / "demo" / "figures" / "demo.png").exists()
