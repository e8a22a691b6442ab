"""The scripts that analyse runs, from the command line, in miniature; none touches the README unasked."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import xarray as xr

from dynamics import results

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # where they import from each other

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = ["--preset=smoke", "--task.modulus=8", "--task.multipliers=[2, 3, 4]", "--task.train_multipliers=2"]
N_ALIASES = 4
"""Of Dt3 and Df4 together, where the modulus is 8."""


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(text: str) -> list[list[str]]:
    """The cells of every row of the Markdown tables in a text, heads and rules included."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


KEY = r"seed-(\d)-[0-9a-f]{8}"
"""What results of a run are called by."""


def named(folder: Path, pattern: str) -> dict[int, Path]:
    """Of each seed the one path in a folder that is called by its run's key and as the pattern says."""
    found = {
        int(hit[1]): p for p in folder.iterdir() if (hit := re.fullmatch(KEY + re.escape(pattern), p.name))
    }
    assert sorted(found) == [0, 1]
    return found


# --- in miniature -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """The smoke preset on eight integers, seeds 0 and 1."""
    folders = [tmp_path_factory.mktemp("runs") / f"seed-{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        command = [sys.executable, "-m", "dynamics.cli", "fit", "--out", folder, *TINY, f"--seed={seed}"]
        subprocess.run([*map(str, command)], env=ENVIRONMENT, check=True, capture_output=True)
    return folders


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the scripts with the README and the pages that they may write into, and nothing else."""
    copy = tmp_path_factory.mktemp("house")
    for name in ("scripts", ".readme"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", copy)
    return copy


def checksums(folder: Path) -> dict[str, str]:
    paths = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.fixture
def run_script(house, tmp_path):
    """Runs a script of the copy in a folder of its own; nothing in the copy may change. Returns what it printed."""

    def run(name: str, *arguments: str | Path, fails: bool = False) -> str:
        before = checksums(house)
        done = subprocess.run(
            [sys.executable, str(house / "scripts" / f"{name}.py"), *map(str, arguments)],
            capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert checksums(house) == before
        assert (done.returncode != 0) == fails, done.stderr
        assert "Warning" not in done.stderr
        return done.stderr if fails else done.stdout

    return run


@pytest.mark.slow
def test_the_worked_example_on_hugging_face_prints_its_four_lines(run_script, tmp_path):
    lines = run_script("hugging_face", "--layers", "1", "--width", "64").splitlines()
    peaks = [line for line in lines if re.search(r"peak \d+\.\d GB$", line)]
    assert [line.split(":")[0].strip() for line in peaks] == [
        "model loaded",
        "patch_signals, one layer's MLP output",
        "patch_gradients, 4 heads",
        "patch_updates, 4 heads",
    ]
    effects = [line for line in lines if re.fullmatch(r"  \S.*: [+-]\d\.\d\de[+-]\d\d", line)]
    assert len(effects) == 3
    assert len(lines) == 1 + len(peaks) + len(effects)
    assert re.fullmatch(r"\d+ M parameters, \d\.\d\d GB", lines[0])
    assert not any(float(line.rpartition(": ")[2]) == 0.0 for line in effects)
    assert list(tmp_path.iterdir()) == []


ANATOMY = [
    "signals", "signals-forward", "positions", "factors", "in-batch", "noise", "window",
    "interactions-gradients", "interactions-updates", "fall-0", "fall-10", "fall-50",
]  # fmt: skip


@pytest.fixture(scope="module")
def anatomy(runs, house, tmp_path_factory) -> tuple[Path, str]:
    """Where the anatomy of both runs is kept, and what was printed."""
    out = tmp_path_factory.mktemp("anatomy")
    command = [house / "scripts" / "anatomy.py", *runs, "--out", out, "--workers", "1"]
    before = checksums(house)
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert checksums(house) == before
    return out, done.stdout


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
    assert [row[:2] for row in fall] == [[n, s] for n in ("0", "10", "50") for s in ("fresh", "stored")]
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


@pytest.mark.slow
def test_the_anatomy_called_again_takes_its_datasets_as_they_are(anatomy, runs, run_script):
    out, printed = anatomy
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.h5")}
    again = run_script("anatomy", *runs, "--out", out, "--workers", "1")
    assert again == printed
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.h5")} == before


@pytest.mark.slow
def test_the_anatomys_caption_says_how_many_aliases_the_runs_have(anatomy):
    assert f"{N_ALIASES} aliases each" in anatomy[1]


@pytest.mark.slow
def test_a_planted_site_is_scored_by_every_method_in_every_run(runs, run_script, tmp_path):
    printed = run_script("planted_truth", *runs, "--plants", "attn 0", "--workers", "1")
    kept = tmp_path / "runs" / "planted"
    tables = named(kept, "-attn-0.csv")
    pages = {kept / name for name in ("grades.csv", "planted.md", "planted.png")}
    assert {*kept.iterdir()} == {*tables.values()} | pages
    assert (kept / "planted.md").read_text() == printed
    for table in tables.values():
        world = pd.read_csv(table)
        assert world["site"].tolist() == [
            *("embed", "pos_embed"),
            *(f"{part} {layer}" for layer in (0, 1) for part in ("attn", "mlp", "ln")),
            *("ln_final", "unembed"),
        ]
        assert world.loc[world["planted"], "site"].tolist() == ["attn 0"]
        assert world["decoy"].sum() == 3
        assert not (world["planted"] & world["decoy"]).any()
        assert world["truth"].abs().idxmax() == world["planted"].idxmax()  # the tag can act nowhere else
        scored = world.drop(columns=["seed", "plant", "site", "planted", "decoy", "truth"])
        assert scored.notna().sum().isin([5, 10]).all()  # all sites, or those with an activation of their own
        assert (scored.fillna(0.0) > -1e-6).all().all()  # sizes, and one less a cosine
    grades = pd.read_csv(kept / "grades.csv")
    assert set(grades["seed"]) == {0, 1}
    assert grades["auc"].between(0, 1).all()
    assert len(grades) == 2 * grades["method"].nunique()
    rows = rows_of(printed)
    assert {len(row) for row in rows} == {5}  # no method's name has bars of its own
    assert [row[0] for row in rows[2:]].count("chance") == 1
    assert {row[0] for row in rows[2:]} == {*grades["method"], "chance"}
    assert "The plant has the largest true effect in 2 of 2 worlds." in printed
    again = run_script("planted_truth", *runs, "--plants", "attn 0", "--workers", "1")
    assert again == printed


@pytest.mark.slow
def test_a_plant_that_the_model_does_not_have_is_named(runs, run_script):
    assert "L0H2" in run_script("planted_truth", runs[0], "--plants", "L0H2", "--workers", "1", fails=True)


@pytest.mark.slow
def test_the_loop_is_closed_in_every_world_of_every_run(runs, run_script, tmp_path):
    arguments = [*runs, "--steps", "4", "--look", "2", "--workers", "1", "--out", tmp_path / "loop"]
    printed = run_script("closing_the_loop", *arguments)
    tables = named(tmp_path / "loop", "-4-2-together.csv")
    assert {*(tmp_path / "loop").iterdir()} == {*tables.values()}
    for table in tables.values():
        worlds = pd.read_csv(table).set_index("erased")
        n_random = script("closing_the_loop").N_RANDOM
        assert worlds.index.tolist() == [
            "nowhere", "everywhere", "chosen", *(f"random {i}" for i in range(n_random)),
        ]  # fmt: skip
        chosen = worlds.loc["chosen", "matrices"].split(", ")
        assert len(chosen) == 3  # a tenth of 30
        for name in worlds.index[3:]:
            assert not {*chosen} & {*worlds.loc[name, "matrices"].split(", ")}
            assert 0.5 < worlds.loc[name, "parameters of the chosen"] < 2
            assert 0.5 < worlds.loc[name, "difference of the chosen"] < 2
        logits = worlds["correct_logit"]
        assert logits.notna().all()
        assert logits["nowhere"] != logits["everywhere"]
    head, _, *rows = rows_of(printed)
    assert len(head) == 5
    assert [row[0] for row in rows] == [
        "nowhere", "everywhere", "the chosen 10% of matrices", "random matrices, matched",
    ]  # fmt: skip
    assert {len(row) for row in rows} == {5}
    assert "Seeds 0, 1; chosen together by the first 2 of 4 steps of X2" in printed
    assert run_script("closing_the_loop", *arguments) == printed


@pytest.mark.slow
def test_alignment_has_a_row_for_what_parts_in_each_phase(runs, run_script, tmp_path):
    said = run_script("alignment", *runs, "--out", "aligned")
    table = rows_of(said)
    assert [row[:2] for row in table[2:]] == [
        ["X1", "accuracy, DtQ1 − DfQ2"],
        ["X1", "alignment, as trained, DtQ1 − DfQ2"],
        ["X2", "accuracy, Dt3 − Df4"],
        ["X2", "alignment, as trained, Dt3 − Df4"],
        ["X1, X2", "accuracy, Dt3 − Df4"],
        ["X1, X2", "alignment, either tag, reliable − unreliable"],
        ["X1, X2", "attention to the tag"],
    ]
    for folder in named(tmp_path / "aligned", "").values():
        trained, exchanged = (results.load(folder / f"{name}.h5") for name in ("trained", "exchanged"))
        assert trained.sizes["step"] == exchanged.sizes["step"]
        assert not np.array_equal(trained["own"], exchanged["own"])
    folders = named(tmp_path / "aligned", "").values()
    first = [results.load(folder / "scores.h5")["accuracy"].isel(step=0) for folder in folders]
    gap = np.mean([float(a.sel(example="DtQ1") - a.sel(example="DfQ2")) for a in first])
    assert table[2][2].startswith(f"{gap:+.2f} ")
    assert (tmp_path / "aligned" / "alignment.png").stat().st_size > 10_000
    assert run_script("alignment", *runs, "--out", "aligned") == said


@pytest.mark.slow
def test_the_example_of_comparing_leaves_datasets_and_figures(runs, run_script, tmp_path):
    said = run_script("compare_checkpoints", runs[0], "--from", "121", "--to", "138", "--out", "compared")
    assert said.startswith("site, by relative\n")
    assert "accuracy of Dt3: " in said
    out = tmp_path / "compared"
    assert {path.stem for path in out.glob("*.png")} == {"moved", "weights", "alignment", "attribution"}
    pair = results.load(out / "pair" / "weights.h5")
    top = str(pair["site"].values[int(pair["relative"].values.argmax())])
    assert said.splitlines()[1].startswith(f"  {top}: ")
    effects = results.load(out / "steps" / "effects.h5")
    scores = results.load(out / "steps" / "scores.h5")
    assert effects["step"].values.tolist() == scores["step"].values.tolist()[:-1]


@pytest.mark.slow
def test_the_cost_of_comparing_is_told_with_its_goals(run_script):
    said = run_script("comparison_cost", "--checkpoints", "4", "--threads", "1")
    table = rows_of(said)
    assert table[0][0] == "4 checkpoints of the toy"
    assert [row[2] for row in table[2:]] == ["under 0.2 s", "under 60 s", "under 1 GB"]
    assert table[3][0] == "3 neighbours compared"


@pytest.mark.slow
def test_another_run_of_the_same_seed_is_not_given_the_first_runs_results(runs, tmp_path):
    command = ["fit", "--out", tmp_path / "other", *TINY, "--seed=0", "--phases.x1.learning_rate=0.01"]
    subprocess.run(
        [sys.executable, "-m", "dynamics.cli", *map(str, command)],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    one_run = script("closing_the_loop").one_run
    first, other = (
        one_run(folder, 2, 2, "alone", tmp_path / "loop") for folder in (runs[0], tmp_path / "other")
    )
    assert first["correct_logit"].tolist() != other["correct_logit"].tolist()


# --- arithmetic -------------------------------------------------------------------------------------------


def world(scores: list[float], planted: int = 0, seed: int = 0) -> pd.DataFrame:
    """Four sites, the first or another planted, and one method's scores."""
    return pd.DataFrame(
        {
            "seed": seed,
            "plant": "embed",
            "site": list("abcd"),
            "planted": [i == planted for i in range(4)],
            "decoy": False,
            "truth": [-4.0, 1.0, 2.0, 3.0],
            "a method": scores,
        }
    )


@pytest.mark.parametrize(
    ("scores", "planted", "auc", "top1"),
    [
        ([9, 1, 2, 3], 0, 1.0, 1.0),
        ([0, 1, 2, 3], 0, 0.0, 0.0),
        ([2, 1, 2, 3], 0, 0.5, 0.0),  # one below, one alike, one above
        ([5, 5, 5, 5], 0, 0.5, 0.0),
        ([9, 1, 2, 3], 3, 2 / 3, 0.0),
        ([np.nan, 1, 2, 3], 3, 1.0, 1.0),
    ],
)
def test_a_method_is_graded_by_how_many_sites_it_scores_below_the_plant(scores, planted, auc, top1):
    graded = script("planted_truth").graded(world(scores, planted), "a method")
    assert (graded["auc"], graded["top1"]) == (pytest.approx(auc), top1)
    assert graded["n"] == np.isfinite(scores).sum()


def test_ranks_are_correlated_with_the_size_of_the_truth():
    planted_truth = script("planted_truth")
    assert planted_truth.graded(world([4, 1, 2, 3]), "a method")["rank"] == pytest.approx(1.0)
    assert planted_truth.graded(world([1, 4, 3, 2]), "a method")["rank"] == pytest.approx(-1.0)
    assert planted_truth.graded(world([2, 2, 2, 2]), "a method")["rank"] == 0.0
    assert planted_truth.graded(world([np.nan, 1, 2, 3]), "a method") == {}


def test_the_table_of_methods_has_means_over_seeds_and_the_best_first():
    planted_truth = script("planted_truth")
    parts = [
        world([[9, 1, 2, 3], [0, 1, 2, 3]][i], seed=i).assign(**{"a better": [4, 1, 2, 3]}) for i in range(2)
    ]
    rows = rows_of(planted_truth.table(planted_truth.grades(parts)))
    assert [row[0] for row in rows[2:]] == ["a better", "a method", "chance"]
    assert rows[2][1] == "1.00 [1.00, 1.00]"
    bounds = scipy.stats.ttest_1samp([1, 0], 0).confidence_interval()
    assert rows[3][1] == f"0.50 [{bounds.low:.2f}, {bounds.high:.2f}]"
    assert rows[4][2] == "0.25"


def test_what_is_gone_is_the_ratio_of_means_over_seeds():
    closing = script("closing_the_loop")
    gaps = {"nowhere": [4.0, 6.0, 5.0], "everywhere": [1.0, 1.0, 1.5], "chosen": [2.0, 2.5, 2.0]}
    gaps |= {"random 0": [4.0, 5.0, 5.0], "random 1": [3.0, 5.5, 4.0]}
    rows = [
        {"seed": i, "erased": name, "matrices": "W_E, W_U", "parameters of the chosen": 1.0,
         "difference of the chosen": 1.0, "accuracy": value[i] / 10, "correct_logit": value[i]}
        for name, value in gaps.items() for i in range(3)
    ]  # fmt: skip
    by_name = {row[0]: row for row in rows_of(closing.table(pd.DataFrame(rows), 4, 10, "together"))[2:]}
    mean = {name: np.mean(value) for name, value in gaps.items()}
    mean["random"] = (mean.pop("random 0") + mean.pop("random 1")) / 2
    for name, row in {"chosen": "the chosen 10% of matrices", "random": "random matrices, matched"}.items():
        gone = (mean["nowhere"] - mean[name]) / (mean["nowhere"] - mean["everywhere"])
        assert by_name[row][4].startswith(f"{gone:.0%} [")
        assert by_name[row][3].startswith(f"{mean[name]:+.2f} [")
    assert by_name["everywhere"][4] == "100% [100%, 100%]"
    assert by_name["nowhere"][4].startswith("0% [")


def test_covered_elements_stand_in_one_vector_in_the_sites_order():
    import torch

    from dynamics.sites import Site

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7.0, 8.0])}
    site = Site("some", {"b": ..., "a": (slice(None), 1)})
    assert script("planted_truth").covered(tensors, site).tolist() == [7.0, 8.0, 1.0, 4.0]
    assert script("closing_the_loop").squared(tensors, site) == 49 + 64 + 1 + 16


def test_over_runs_keeps_the_mean_of_each_runs_aliases():
    anatomy = script("anatomy")
    parts = [
        xr.Dataset(
            {"effect": (("example", "site"), np.arange(6.0).reshape(3, 2) + 10 * i)}, {"site": ["a", "b"]}
        )
        .assign_coords(example=[f"alias {k + i}" for k in range(3)])
        .assign_attrs(provenance="{}")
        for i in range(2)
    ]
    joined = anatomy.over_runs(parts)
    assert joined["effect"].dims == ("seed", "site")
    assert joined["effect"].values.tolist() == [[2.0, 3.0], [12.0, 13.0]]


def test_an_event_is_found_and_averaged_on_the_scale_of_log_steps():
    alignment = script("alignment")
    steps = np.array([0, 1, 3, 9, 27, 81])
    late = np.array([steps >= 3, steps >= 27, steps >= 81 * 2], float)
    found = alignment.event(xr.DataArray(late, dims=("seed", "step"), coords={"step": steps}))
    np.testing.assert_allclose(found["at"], [3, 27, np.nan])
    assert int(found["n"]) == 2
    np.testing.assert_allclose(found["mean"], np.sqrt(4 * 28) - 1)
    assert float(found["low"]) >= 0


def test_the_same_aliases_stand_under_either_tag():
    alignment = script("alignment")
    labels = {"example": ["a", "b", "c"], "set": ["Dt3", "Df4", "Df4"]}
    coords = {**results.coordinates(labels, "example"), "site": ["everything"], "step": [5, 6]}

    def own(values):
        array = np.broadcast_to(np.asarray(values, float), (2, 1, 3))
        return xr.Dataset({"own": (("step", "site", "example"), array)}, coords)

    pairs = {"accuracy": (("step", "example"), np.zeros((2, 2)))}
    scores = xr.Dataset(pairs, {"example": ["Dt3", "Df4"], "step": [5, 6]})
    looked = {"attention": (("step", "measure", "site"), np.full((2, 2, 1), 0.5))}
    roles = xr.Dataset(looked, {"measure": ["to tag", "to alias"], "step": [5, 6]})
    run = {"trained": own([1, 20, 30]), "exchanged": own([4, 50, 60]), "scores": scores, "roles": roles}
    panels = alignment.panels([run], ("Dt3", "Df4"), 5, 6)
    np.testing.assert_allclose(panels["alignment, either tag"]["reliable"], (1 + 50 + 60) / 3)
    np.testing.assert_allclose(panels["alignment, either tag"]["unreliable"], (4 + 20 + 30) / 3)
    np.testing.assert_allclose(panels["alignment, as trained"]["Df4"], 25)
    assert panels["accuracy"]["step"].values.tolist() == [0, 1]
