"""`dynamics account`: a table that adds up, the Dataset, two figures."""

from __future__ import annotations

import pytest

from dynamics import results
from tests.cli.calling import dynamics, succeed
from tests.zoo.sweep_runs import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "run", 0).path


@pytest.mark.slow
def test_it_prints_what_each_site_and_source_wrote_and_keeps_it_beside_two_figures(run):
    printed = succeed("account", run, "--from", 6, "--levels", "components", "heads")
    path = run / "results" / "account" / "account-6-12-components-heads-sets.h5"
    found = results.load(path)
    shown = results.difference(
        found.isel(measure=0, site=found["level"].values == "components"), "Dt3", "Df4"
    )
    lines = [line.split() for line in printed.splitlines()]
    by_site = {words[0]: float(words[-1]) for words in lines if words and words[0] in ("embed", "unembed")}
    for site, wrote in by_site.items():
        assert wrote == pytest.approx(float(shown["attribution"].sel(site=site).sum()), rel=0.01)
    assert "correct_logit of Dt3 − Df4, steps 6 to 12" in printed
    for name in ("stacked", "map"):
        assert path.with_name(f"{path.stem}-{name}.png").stat().st_size > 10_000
    without = succeed("account", run, "--from", 6, "--to", 8, "--sources", "none", "--every", 2)
    assert "source" not in without
    assert list(results.load(run / "results/account/account-6-8-components-none.h5")["step"].values) == [6, 8]


@pytest.mark.slow
def test_every_definition_is_a_source_of_its_own(run):
    printed = succeed("account", run, "--from", 6, "--to", 8, "--sources", "integers")
    assert "definition of alias" in printed
    assert "replays: about" in succeed("account", run, "--from", 6, "--dry-run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", 8, "--to", 8], "an account goes from a step to a later one"),
        (["--levels", "rooms"], "invalid choice"),
        (["--from", 6, "--to", 99], "step 99 is not a step of"),
    ],
)
def test_what_cannot_be_is_said(run, words, message):
    done = dynamics("account", run, *words)
    assert done.returncode != 0
    assert message in done.stderr
