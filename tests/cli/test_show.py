"""`dynamics show`: what a run or a file of results holds."""

import numpy as np
import pytest
import xarray as xr

from dynamics import results
from dynamics.cli import main

EFFECTS = np.array([[[1.0, -4.0, 0.5], [2.0, -5.0, 0.25]], [[10.0, 3.0, 0.5], [11.0, 2.0, 0.5]]])
"""[step, example, site]"""


def effects(step: int) -> xr.Dataset:
    return results.effects(
        EFFECTS[step],
        {"base": np.zeros(2), "source": np.array([4.0, 5.0])},
        {"example": ["one", "two"]},
        {"site": ["attn 0", "mlp 0", "L0H1"], "level": ["components", "components", "heads"]},
        None,
        "logit",
        "{}",
    )


@pytest.fixture
def file(tmp_path):
    found = results.concat([effects(0), effects(1)], "step", [5, 9])
    results.save(found, tmp_path / "patch.h5")
    return tmp_path / "patch.h5"


def shown(capsys, *words) -> str:
    main(["show", *map(str, words)])
    return capsys.readouterr().out


def complaint(capsys, *words) -> str:
    with pytest.raises(SystemExit) as left:
        main(["show", *map(str, words)])
    assert left.value.code == 1
    return capsys.readouterr().err


def columns(text: str) -> dict[str, str]:
    """First word -> the rest, long lines joined."""
    found, name = {}, ""
    for line in text.splitlines():
        if not line.startswith(" "):
            name, _, line = line.partition("  ")
        found[name] = " ".join([*found.get(name, "").split(), *line.split()])
    return found


def test_a_run_is_listed_with_all_it_holds(capsys, alias_run, file):
    (alias_run / "results").mkdir()
    (alias_run / "figures").mkdir()
    file.rename(alias_run / "results" / "patch.h5")
    (alias_run / "figures" / "heads.png").write_bytes(b"png")
    sizes = [path.stat().st_size for path in alias_run.rglob("*") if path.is_file()]
    said = columns(shown(capsys, alias_run))
    assert said["task"] == "aliases, seed 3"
    assert said["phases"] == "pretrain 0 to 2, x1 3 to 6, x2 7 to 506"
    assert said["checkpoints"] == "5 at steps 0-3, 7"
    assert said["results"] == "results/patch.h5: 2 step, 2 example, 3 site"
    assert said["figures"] == "figures/heads.png"
    assert said["size"] == f"{sum(sizes) / 1e6:,.1f} MB in {len(sizes)} files"


def test_results_that_lie_outside_the_run_are_not_looked_at(capsys, alias_run, file):
    (alias_run / "results").mkdir()
    (alias_run / "results" / "odd.h5").symlink_to(file)
    said = columns(shown(capsys, alias_run))["results"].replace(" ", "")
    assert "odd.h5leadsoutoftherun'sfolder" in said
    assert "3site" not in said


def test_of_a_run_of_ones_own_is_said_what_is_known(capsys, own_run):
    said = columns(shown(capsys, own_run))
    assert said["task"].startswith("not known: the config names no task of this toolkit")
    assert said["config"] == "seed 3, task.name mnist, lr 0.1"
    assert said["checkpoints"] == "4 at steps 0, 2, 3, 5"
    assert (said["results"], said["figures"]) == ("none", "none")


def test_of_an_imported_run_is_said_where_it_is_from(capsys, imported_run):
    said = columns(shown(capsys, imported_run))
    assert said["task"].startswith("not known: imported from 2 state_dicts, the first ")
    assert said["task"].endswith("model_1.pt")
    assert said["checkpoints"] == "2 at steps 1, 20"


def test_the_sites_of_a_run_are_listed_by_level(capsys, alias_run):
    said = columns(shown(capsys, alias_run, "--sites"))
    assert said["heads"] == "L0H0, L0H1"
    assert said["layers"] == "block 0"
    assert said["circuits"].split(", ")[0] == "QK L0H0"
    assert list(said) == ["layers", "components", "heads", "circuits", "matrices", "up_to_layer"]


def test_of_a_model_that_is_not_known_the_parameters_are_listed(capsys, own_run, imported_run):
    said = columns(shown(capsys, own_run, "--sites"))
    assert said["parameters"] == "0.weight [5, 3] 0.bias [5] 2.weight [1, 5] 2.bias [1]"
    assert "w [2, 3]" in shown(capsys, imported_run, "--sites")


def test_the_table_of_a_file_is_of_one_value_of_each_dim(capsys, file):
    first, at, gap, _, *rows = shown(capsys, file).splitlines()
    assert first == f"{file}: 2 step, 2 example, 3 site"
    assert at == "at step=5 (or 9)"
    assert gap.startswith("gap 4.50 ")
    means = {row[:6].strip(): float(row[6:].split()[0]) for row in rows}
    assert means == {"attn 0": 1.5, "mlp 0": -4.5, "L0H1": 0.375}


def test_at_chooses_a_step_and_a_level(capsys, file):
    _, at, _, _, *rows = shown(capsys, file, "--at", "step=9", "level=components").splitlines()
    assert at == "at step=9"
    assert {row[:6].strip(): float(row[6:].split()[0]) for row in rows} == {"attn 0": 10.5, "mlp 0": 2.5}


def test_of_another_dataset_its_variables_are_listed(capsys, tmp_path):
    found = xr.Dataset(
        {"loss": ("step", [2.5, 1.0, np.nan], {"units": "nat", "long_name": "mean loss"})},
        coords={"step": [0, 1, 2]},
    )
    results.save(found, tmp_path / "loss.h5")
    said = columns(shown(capsys, tmp_path / "loss.h5"))
    assert said["loss"] == "[step] mean loss (nat) 1 to 2.5"
    assert said["step"] == "[step] 0 to 2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["FILE", "--at", "stp=9"],
            "--at stp=9: no dim or coordinate 'stp'; there are .* Did you mean 'step'?",
        ),
        (["FILE", "--at", "step=8"], "--at step=8: step has no '8'; it has 5, 9."),
        (["FILE", "--sites"], "--sites is of a run"),
        (["FOLDER", "--at", "step=9"], "--at is of a file of results"),
        (["FOLDER"], "is no run"),
        (["FOLDER/none.h5"], "is no run"),
        (["FOLDER/text.h5"], "is no file of results"),
    ],
)
def test_what_is_not_there_is_said(capsys, tmp_path, file, words, message):
    (tmp_path / "text.h5").write_text("text")
    given = [word.replace("FILE", str(file)).replace("FOLDER", str(tmp_path)) for word in words]
    said = complaint(capsys, *given)
    begin, _, end = message.partition(".*")
    assert begin in said
    assert end in said
    assert len(said.splitlines()) == 1
