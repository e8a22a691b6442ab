"""Draw the figure that fits a file of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynamics.cli import datasets
from dynamics.cli.parsing import CommandError, Parser

if TYPE_CHECKING:
    import xarray as xr

    from dynamics.plots import Figure

ALONG_TRAINING = (
    "relative",
    "relative_update",
    "cosine",
    "cka",
    "divergence",
    "attention",
    "own",
    "source",
)
"""What a comparison has at each site and checkpoint; of several in one file the first is drawn."""

CURVES = ("accuracy", "loss", "correct_logit", "kl")
"""What it has at each checkpoint of each set, alias or contrast: a panel each."""


def run(words: Sequence[str]) -> None:
    """`dynamics plot FILE.h5 [--out FILE.png]`."""
    parser = Parser(
        prog="dynamics plot",
        usage="dynamics plot FILE.h5 [--out FILE.png] [--at NAME=VALUE ...] [--overwrite]",
        description="The figure follows from what the file holds and --at leaves of it: of patched or attributed "
        "sites tiles where they have positions, sites by steps where there are several steps, sites by pairs "
        "of checkpoints, stored against fresh "
        "optimizer states, a map of heads, or each site with its interval; of a comparison the map or the curves "
        "that dynamics compare draws.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.h5", help="a file of results")
    parser.add_argument(
        "--out", type=Path, help="its file: .png, .svg or .pdf; default: .png beside the file"
    )
    datasets.add_at(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a figure that is there")
    given = parser.parse_args(list(words))

    out = given.out or given.file.with_suffix(".png")
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise CommandError(
            f"--out {out}: figures are saved as PNG, SVG or PDF; expected {out.with_suffix('.png')}."
        )
    if out.exists() and not given.overwrite:
        raise CommandError(f"{out} is there already. Give --out FILE.png, or --overwrite to replace it.")
    from dynamics import plots

    dataset = datasets.at(datasets.load(given.file), given.at)
    try:
        figure, chosen = _figure(dataset, given.file)
    except ValueError as error:
        raise CommandError(f"{given.file} cannot be drawn: {error}") from error
    plots.save(figure, out, {"provenance": str(dataset.attrs.get("provenance", ""))})
    print(f"{out}" + (f", at {', '.join(chosen)}" if chosen else ""))


def _figure(dataset: xr.Dataset, path: Path) -> tuple[Figure, list[str]]:
    """The figure that fits, and in words what was selected for it."""
    from dynamics import statistics

    value = "effect" if "effect" in dataset else "attribution"
    if statistics.is_summary(dataset) or statistics.can_be_summarised(dataset):
        return _of_effects(dataset, value)
    if value in dataset and "pos" in dataset.coords:
        return _tiles(dataset, value)
    if {"step", "site"} <= set(dataset.dims):
        return _along_training(dataset, path)
    if {"step", "example"} <= set(dataset.dims):
        return _curves(dataset), []
    if "relative" in dataset:
        from dynamics import plots

        weights, level = _one_level(dataset, "matrices")
        return plots.moved(weights, _beside(path, "logits")), level
    held = ", ".join(f"{name} [{', '.join(map(str, a.dims))}]" for name, a in dataset.data_vars.items())
    raise CommandError(
        f"no figure fits {path}, which holds {held}. There are figures of effects and attributions of sites, "
        "and of what dynamics compare keeps; dynamics.plots has them all."
    )


def _of_effects(dataset: xr.Dataset, value: str) -> tuple[Figure, list[str]]:
    """Tiles, sites by steps, states against each other, heads, or intervals."""
    from dynamics import plots, statistics

    if "pos" in dataset.coords and not statistics.is_summary(dataset):
        return _tiles(dataset, value)
    one, level = _one_level(dataset)
    several = [dim for dim in ("step", "optimizer") if one.sizes.get(dim, 1) > 1][:1]
    if {"step", "source_step"} <= set(one.dims):
        several = ["step", "source_step"]
    one, words = datasets.first_of_others(one, ("site", "example", "seed", *several))
    summary = one if statistics.is_summary(one) else statistics.summarize(one)
    words = [*level, *words]
    if several == ["step", "source_step"]:
        return plots.transfer(summary), words
    if several == ["step"]:
        return plots.site_by_step(summary), words
    if several and {"stored", "fresh"} <= set(summary["optimizer"].values.tolist()):
        return plots.stored_and_fresh(summary), words
    if several:
        summary, more = datasets.first_of_others(summary, ("site",))
        words += more
    heads = set(zip(summary["layer"].values.tolist(), summary["head"].values.tolist(), strict=True))
    if len(heads) == summary.sizes["site"] and all(-1 not in place for place in heads):
        return plots.heatmap(summary), words
    return plots.recoveries(summary), words


def _tiles(dataset: xr.Dataset, value: str) -> tuple[Figure, list[str]]:
    from dynamics import plots

    facet = next((dim for dim in ("measure", "step") if dataset.sizes.get(dim, 1) > 1), "measure")
    one, words = datasets.first_of_others(dataset, ("site", "example", "seed", facet))
    return plots.tiles(one, value, facet), words


def _along_training(dataset: xr.Dataset, path: Path) -> tuple[Figure, list[str]]:
    """Sites by checkpoints, under the accuracies that stand beside."""
    from dynamics import plots

    value = next((name for name in ALONG_TRAINING if name in dataset), None)
    if value is None:
        raise CommandError(f"no figure fits {path}: expected one of {', '.join(ALONG_TRAINING)} in it.")
    one, level = _one_level(dataset, "matrices")
    if "example" in one.dims:
        one = one[[value]].mean("example", keep_attrs=True)
    one, words = datasets.first_of_others(one, ("site", "step"))
    return plots.map_under_accuracies(one, value, _beside(path, "scores")), [*level, *words]


def _curves(dataset: xr.Dataset) -> Figure:
    """Each quantity over the steps of training, by set where examples are of several."""
    import xarray as xr

    from dynamics import plots

    by = "set" if "set" in dataset.coords else "example"
    panels: list[plots.Panel] = []
    for name in (name for name in CURVES if name in dataset):
        means = dataset[name].groupby(by).mean() if by == "set" else dataset[name]
        curves = {str(key): means.sel({by: key}, drop=True) for key in means[by].values}
        words, units = (dataset[name].attrs.get(key, "") for key in ("long_name", "units"))
        words += f" ({units})" if units not in ("", "1", "share") else ""
        panels.append((xr.Dataset(curves, attrs={"long_name": words}), {}))
    return plots.event_curves({"": panels})


def _one_level(dataset: xr.Dataset, preferred: str = "") -> tuple[xr.Dataset, list[str]]:
    """The sites of one level, the preferred or the first, where there are several; and which, in words."""
    levels = list(dict.fromkeys(dataset["level"].values.tolist())) if "level" in dataset.coords else []
    if len(levels) < 2:
        return dataset, []
    chosen = preferred if preferred in levels else levels[0]
    others = ", ".join(str(level) for level in levels if level != chosen)
    return dataset.isel(site=dataset["level"].values == chosen), [f"level={chosen} (or {others})"]


def _beside(path: Path, name: str) -> xr.Dataset:
    """The Dataset of the same comparison that a figure needs too."""
    other = path.with_name(f"{name}.h5")
    if not other.is_file():
        raise CommandError(
            f"the figure of {path} needs {other} too, which dynamics compare writes beside it."
        )
    return datasets.load(other)
