"""`dynamics plot`: the figure follows from what a file holds."""

import numpy as np
import pytest
import xarray as xr

from dynamics import plots, results
from dynamics.cli import main

HEADS = {
    "site": ["L0H0", "L0H1", "L1H0", "L1H1"],
    "layer": [0, 0, 1, 1],
    "head": [0, 1, 0, 1],
    "level": ["heads"] * 4,
}
PARTS = {"site": ["attn 0", "mlp 0"], "layer": [0, 0], "level": ["components"] * 2}
TILES = {"site": ["a 0", "a 1"], "layer": [0, 0], "component": ["attn"] * 2, "pos": [0, 1]}


def effects(sites, seed=0) -> xr.Dataset:
    draw = np.random.default_rng(seed)
    return results.effects(
        draw.normal(size=(3, len(sites["site"]))),
        {"base": np.zeros(3), "source": np.ones(3)},
        {"example": ["one", "two", "three"]},
        sites,
        None,
        "logit",
        "{}",
    )


def along(sites, dim, values) -> xr.Dataset:
    return results.concat([effects(sites, seed) for seed, _ in enumerate(values)], dim, values)


def mixed() -> xr.Dataset:
    """Two levels in one file, as a study has them."""
    both = {
        "site": [*PARTS["site"], *HEADS["site"]],
        "layer": [*PARTS["layer"], *HEADS["layer"]],
        "head": [None, None, *HEADS["head"]],
        "level": [*PARTS["level"], *HEADS["level"]],
    }
    return results.concat(
        [along(both, "step", [0, 10]), along(both, "step", [0, 10])], "optimizer", ["stored", "fresh"]
    )


def curves(value: str, dims=("step", "example")) -> xr.Dataset:
    sizes = {"step": 3, "example": 2, "site": 2}
    coords = {"step": [0, 5, 9], "example": ["Dt3", "Df4"], "site": ["W_E", "W_U"]}
    values = np.random.default_rng(1).uniform(size=[sizes[dim] for dim in dims])
    described = {"units": "share", "long_name": value}
    return xr.Dataset({value: (dims, values, described)}, coords={dim: coords[dim] for dim in dims})


CASES = {
    "site_by_step": (along(PARTS, "step", [0, 10]), []),
    "transfer": (
        results.concat([along(PARTS, "step", [0, 10]), along(PARTS, "step", [0, 10])], "source_step", [3, 7]),
        [],
    ),
    "stored_and_fresh": (along(PARTS, "optimizer", ["stored", "fresh"]), []),
    "heatmap": (effects(HEADS), []),
    "recoveries": (effects(PARTS), []),
    "tiles": (effects(TILES), []),
    "event_curves": (curves("accuracy"), []),
    "map_under_accuracies": (curves("relative", ("step", "site")), []),
}


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """The names of the figures of dynamics.plots that are made."""
    names = []
    for name in CASES:
        real = getattr(plots, name)
        monkeypatch.setattr(
            plots,
            name,
            lambda *given, real=real, name=name, **named: names.append(name) or real(*given, **named),
        )
    return names


@pytest.mark.parametrize("name", CASES)
def test_the_figure_that_fits_is_drawn_beside_the_file(tmp_path, capsys, drawn, name):
    results.save(CASES[name][0], tmp_path / "found.h5")
    results.save(curves("accuracy"), tmp_path / "scores.h5")
    main(["plot", str(tmp_path / "found.h5")])
    assert drawn == [name]
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith(str(tmp_path / "found.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "name", "said"),
    [
        ([], "site_by_step", "at level=components (or heads), optimizer=stored (or fresh)"),
        (["step=10"], "stored_and_fresh", "at level=components (or heads), step=10"),
        (
            ["step=10", "optimizer=fresh"],
            "recoveries",
            "at level=components (or heads), optimizer=fresh, step=10",
        ),
        (["step=10", "optimizer=fresh", "level=heads"], "heatmap", "at optimizer=fresh, step=10"),
    ],
)
def test_at_leaves_what_another_figure_fits(tmp_path, capsys, drawn, at, name, said):
    results.save(mixed(), tmp_path / "found.h5")
    main(["plot", str(tmp_path / "found.h5"), *(["--at", *at] if at else [])])
    assert drawn == [name]
    assert capsys.readouterr().out == f"{tmp_path / 'found.png'}, {said}\n"


def complaint(capsys, *words) -> str:
    with pytest.raises(SystemExit) as left:
        main(["plot", *map(str, words)])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_figure_is_replaced_only_when_asked(tmp_path, capsys):
    results.save(effects(PARTS), tmp_path / "found.h5")
    (tmp_path / "found.png").write_bytes(b"mine")
    assert complaint(capsys, tmp_path / "found.h5").endswith("or --overwrite to replace it.")
    assert (tmp_path / "found.png").read_bytes() == b"mine"
    main(["plot", str(tmp_path / "found.h5"), "--out", str(tmp_path / "other.png")])
    assert (tmp_path / "found.png").read_bytes() == b"mine"
    main(["plot", str(tmp_path / "found.h5"), "--overwrite"])
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "other.png").read_bytes() != b"mine"


def test_what_cannot_be_drawn_is_said(tmp_path, capsys):
    results.save(xr.Dataset({"loss": ("row", [1.0])}), tmp_path / "rows.h5")
    assert "which holds loss [row]" in complaint(capsys, tmp_path / "rows.h5")
    results.save(curves("cka", ("step", "site")), tmp_path / "cka.h5")
    assert f"needs {tmp_path / 'scores.h5'} too" in complaint(capsys, tmp_path / "cka.h5")
    assert "there is no file" in complaint(capsys, tmp_path / "none.h5")
    assert "expected" in complaint(capsys, tmp_path / "rows.h5", "--out", tmp_path / "rows.jpg")
    assert not list(tmp_path.glob("*.p??"))
