"""The anatomy of a definition's step, in miniature: what it keeps, what its page says."""

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from dynamics import results
from scripts.experiments import anatomy as script
from tests.scripts.calling import call, in_small, named, rows_of

N_ALIASES = 4
"""Of Dt3 and Df4 together, where the modulus is 8."""

SMALL = {"WINDOW": 10, "LATER": (0, 10, 50)}
"""X2 is over before its fiftieth step."""

ANATOMY = [
    "signals", "signals-forward", "positions", "factors", "in-batch", "noise", "window",
    "interactions-gradients", "interactions-updates", "fall-0", "fall-10",
]  # fmt: skip


@pytest.fixture(scope="session")
def anatomy(alias_runs, made_once) -> tuple[Path, str]:
    """Where the anatomy of both runs is kept, and what was printed; its window is of ten steps instead of 50."""

    def make(folder: Path) -> None:
        with in_small(script, **SMALL):
            printed = call(script, *alias_runs, "--out", folder / "kept", "--workers", 1)
        (folder / "printed").write_text(printed)

    made = made_once("anatomy", make)
    return made / "kept", (made / "printed").read_text()


@pytest.mark.slow
def test_the_anatomy_keeps_a_dataset_for_every_question_and_run_and_a_page(anatomy):
    out, printed = anatomy
    folders = named(out, "")
    assert {p for p in out.rglob("*") if p.is_file()} == {
        out / "anatomy.md",
        *(folder / f"{name}.h5" for folder in folders.values() for name in ANATOMY),
    }
    assert (out / "anatomy.md").read_text() == printed.removesuffix("\n")
    for folder in folders.values():
        for name in ANATOMY:
            found = results.load(folder / f"{name}.h5")
            assert found.sizes["example"] == N_ALIASES
            assert found["effect"].notnull().all()


@pytest.mark.slow
def test_the_anatomys_page_has_its_tables_with_a_row_for_every_place(anatomy):
    _, printed = anatomy
    titles = re.findall(r"^## (.*)$", printed, flags=re.M)
    assert [title[:3] for title in titles[:6]] == ["(a)", "(a)", "(b)", "(c)", "(d)", "(e)"]
    assert len(titles) == 8
    sections = dict(zip(titles, re.split(r"^## .*$", printed, flags=re.M)[1:], strict=True))
    for title, section in sections.items():
        rows = rows_of(section)
        assert len({len(row) for row in rows}) == 1, title
        assert all(all(row) for row in rows), title
    first = [row[0] for row in rows_of(sections[titles[0]])]
    in_block = ("attn_out", "resid_mid", "mlp_out", "resid_post")
    assert first[2:] == ["embed", "resid_pre 0", *(f"{place} {i}" for i in (0, 1) for place in in_block)]
    fall = rows_of(sections[titles[5]])[2:]
    assert [row[:2] for row in fall] == [[n, s] for n in ("0", "10") for s in ("fresh", "stored")]
    window = [row[0] for row in rows_of(sections[titles[3]])[2:]]
    assert window[:2] == ["nowhere (as trained)", "everywhere"]
    assert {"embed", "attn 0", "unembed"} < set(window)


@pytest.mark.slow
def test_the_anatomys_numbers_are_means_over_its_datasets(anatomy):
    out, printed = anatomy
    row = next(row for row in rows_of(printed) if row[:2] == ["10", "fresh"])
    parts = [
        results.load(folder / "fall-10.h5").sel(measure="correct_logit") for folder in named(out, "").values()
    ]
    untouched = np.mean([p["untouched"].sel(optimizer="fresh").values.mean() for p in parts])
    assert row[2] == f"{untouched:.2f}"
    changes = [(p["base"] - p["untouched"]).sel(optimizer="fresh").values.mean() for p in parts]
    bounds = scipy.stats.ttest_1samp(changes, 0).confidence_interval()
    assert row[4] == f"{np.mean(changes):+.2f} [{bounds.low:+.2f}, {bounds.high:+.2f}]"
    gaps = [(p["source"] - p["base"]).sel(optimizer="fresh").values.mean() for p in parts]
    assert row[7].startswith(f"{np.mean(gaps):+.2f} [")


@pytest.mark.slow
def test_the_anatomy_called_again_takes_its_datasets_as_they_are(anatomy, alias_runs):
    out, printed = anatomy
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.h5")}
    with in_small(script, **SMALL):
        again = call(script, *alias_runs, "--out", out, "--workers", 1)
    assert again == printed
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.h5")} == before


@pytest.mark.slow
def test_the_anatomys_caption_says_how_many_aliases_the_runs_have(anatomy):
    assert f"{N_ALIASES} aliases each" in anatomy[1]


@pytest.mark.slow
def test_the_anatomys_effects_are_means_over_runs_of_the_means_of_their_aliases(anatomy):
    out, printed = anatomy
    folders = named(out, "").values()
    section = printed.split("## (b)")[1].split("## (c)")[0]
    row = next(row for row in rows_of(section) if row[0] == "W_V 0")
    for shown, factor in zip(row[1:], ("x", "delta", "both"), strict=True):
        of_run = []
        for folder in folders:
            effect = results.load(folder / "factors.h5")["effect"].sel(
                measure="correct_logit", optimizer="fresh"
            )
            of_run.append(effect.sel(site="W_V 0", factor=factor).values.mean())
        bounds = scipy.stats.ttest_1samp(of_run, 0).confidence_interval()
        assert shown == f"{np.mean(of_run):+.2f} [{bounds.low:+.2f}, {bounds.high:+.2f}]"
