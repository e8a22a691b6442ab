"""Maps of sites: what was exchanged or attributed there, exact against attributed, and between checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pandas as pd
import xarray as xr

from dynamics import results, statistics
from dynamics.report.figure import Figure, loaded, made_by
from dynamics.report.packing import packed
from dynamics.report.runs import Result, Run

VERBS = {
    "patch_gradients": "The gradient exchanged at one site",
    "patch_updates": "The finished update exchanged at one site",
    "patch_factors": "One factor of a gradient exchanged at one site",
    "patch_signals": "The backward signal exchanged at one site",
    "patch_activations": "The activation exchanged at one site",
    "patch_window": "The gradient exchanged at one site for a stretch of training",
    "patch_parameters": "The parameters exchanged at one site",
    "attribute_step": "The step attributed to sites",
    "attribute_parameters": "The difference of two checkpoints attributed to sites",
    "attribute_activations": "The activations' difference attributed to sites",
    "align_gradients": "Gradients aligned with the probe's, source less base",
    "weights": "How far weights moved since the checkpoint before",
    "updates": "How updates of neighbouring stretches agree",
    "activations": "How activations changed since the checkpoint before",
    "patterns": "How attention moved since the checkpoint before",
    "sizes": "Sizes of one training step",
    "roles": "Where heads attend",
}
"""Titles of maps, by what found them."""

EXACT = {"patch_gradients": "attribute_step", "patch_updates": "attribute_step"} | {
    "patch_parameters": "attribute_parameters"
}
"""Verbs that exchange, and the verb that attributes the same change."""

SEVERAL = ("step", "source_step", "seed", "optimizer", "measure", "direction", "factor")
"""Dims by which maps are looked through."""


def is_transfer(dataset: xr.Dataset) -> bool:
    """Whether its steps are pairs: sites of one checkpoint in another."""
    return {"step", "source_step"} <= set(dataset.dims)


def can_be_mapped(dataset: xr.Dataset) -> bool:
    """Whether it has numbers for each site, once its examples are summarised."""
    if results.is_account(dataset):
        return False
    if statistics.is_summary(dataset) or statistics.can_be_summarised(dataset):
        return True
    return bool(_of_sites(dataset)) and not {"example", "row", "source"} & set(dataset.dims)


def summarised(dataset: xr.Dataset) -> xr.Dataset:
    """The part of a Dataset that a map shows: of raw effects their summary, else its variables of sites."""
    if statistics.is_summary(dataset):
        return dataset
    if statistics.can_be_summarised(dataset):
        return statistics.summarize(dataset)
    return dataset[_of_sites(dataset)]


def _of_sites(dataset: xr.Dataset) -> list[str]:
    return [
        str(name)
        for name, array in dataset.data_vars.items()
        if "site" in array.dims and set(array.dims) <= {"site", *SEVERAL} and array.dtype.kind in "iuf"
    ]


def titled(result: Result) -> str:
    """What a result says of sites, in plain words where they are known."""
    return VERBS.get(result.verb) or VERBS.get(result.path.stem) or result.verb


def preferred(run: Run) -> dict[str, Any]:
    """What is looked at first: what the config named before anything was seen, else sites by component."""
    primary = run.config.get("patching", {}).get("primary", {})
    named = {name: primary[name] for name in ("measure", "optimizer", "level") if name in primary}
    return {"level": "components", "optimizer": "fresh", **named}


def site_map(run: Run, result: Result) -> Figure:
    """What was found at each site: layer by head where sites are heads, else site by step."""
    summary, title = summarised(result.dataset), titled(result)
    if "effect" not in summary:
        return Figure(
            "map",
            title,
            f"A row for each site{', a column for each step' * ('step' in summary.dims)}; from "
            f"{result.path.parent.name}. Choose a cell to see all that is known of its site.",
            summary,
            (*made_by(run, result), f"dynamics plot {result.path} {{at}}"),
            _along_lines(result),
            {
                "variables": list(map(str, summary.data_vars)),
                "layouts": ["columns"],
                "chosen": preferred(run),
            },
        )
    unit = str(summary.attrs.get("unit", "example"))
    lines = [loaded(result, "effects")]
    lines.append(
        "summary = effects.sel({sel})"
        if statistics.is_summary(result.dataset)
        else "summary = dy.statistics.summarize(effects).sel({sel})"
    )
    lines.append('chosen = summary.isel(site=summary["level"].values == "{level}")\ndy.plots.{draw}(chosen)')
    confidence = 100 * float(summary.attrs.get("confidence", 0.95))
    return Figure(
        "map",
        title,
        f"Mean change of the measure, source run against base run; unit: {unit}; {confidence:g} % intervals. "
        "Bold: q below .05. Choose a cell to see its curve over training, and its ten checks where they were made.",
        summary,
        (*made_by(run, result), f"dynamics plot {result.path} {{at}}"),
        "\n".join(lines),
        {
            "variables": [name for name in ("effect", "recovery") if summary[name].notnull().any()],
            "layouts": ["grid", "columns"],
            "chosen": preferred(run),
        },
    )


def _along_lines(result: Result) -> str:
    """Python lines for a quantity of sites along training."""
    scores = result.path.with_name("scores.h5")
    chosen = 'chosen = found.sel({sel})\nchosen = chosen.isel(site=chosen["level"].values == "{level}")'
    if "step" in result.dataset.dims and scores.is_file():
        return (
            f'{loaded(result, "found")}\nscores = dy.results.load("{scores.as_posix()}")\n{chosen}\n'
            'dy.plots.map_under_accuracies(chosen, "{variable}", scores)'
        )
    return f'{loaded(result, "found")}\n{chosen}\nchosen["{{variable}}"].to_pandas()'


def transfer(run: Run, result: Result) -> Figure:
    """Each site of one checkpoint put into another, over a grid of steps."""
    summary = summarised(result.dataset)
    return Figure(
        "transfer",
        titled(result),
        "Left, one site over all pairs of checkpoints: rows give, columns receive. Right, all sites of the pair "
        "that the two sliders choose. Later into earlier asks what suffices, earlier into later what is necessary.",
        summary,
        (*made_by(run, result), f"dynamics plot {result.path} {{at}}"),
        f"{loaded(result, 'effects')}\nsummary = dy.statistics.summarize(effects).sel({{sel}})\n"
        'chosen = summary.isel(site=summary["level"].values == "{level}")\ndy.plots.transfer(chosen)',
        {
            "variables": [name for name in ("effect", "recovery") if summary[name].notnull().any()],
            "chosen": {**preferred(run), "source_step": int(summary["source_step"].values[-1])},
        },
    )


def agreements(run: Run, found: Sequence[Result]) -> Iterator[Figure]:
    """Exact against attributed: a point for each site, for each two files of one question."""
    for exact, attributed in product(found, found):
        if EXACT.get(exact.verb) == attributed.verb and (figure := agreement(run, exact, attributed)):
            yield figure


def agreement(run: Run, exact: Result, attributed: Result) -> Figure | None:
    """A point for each site: what its exchange did, and what was attributed to it; None where nothing is shared."""
    one, other = exact.dataset, attributed.dataset
    if not all(map(statistics.can_be_summarised, (one, other))) or set(one.dims) != set(other.dims):
        return None
    one, other = xr.align(
        one[["effect", "base", "source"]], other[["attribution", "base", "source"]], join="inner"
    )
    one, other = (part.isel(site=one["level"].values != results.PLACEBO) for part in (one, other))
    if 0 in one.sizes.values():
        return None
    units = [dim for dim in ("example", "seed") if dim in one.dims]
    points = xr.Dataset({"exact": one["effect"], "attributed": other["attribution"]}).mean(
        units, keep_attrs=True
    )
    levels = list(dict.fromkeys(one["level"].values.tolist()))
    ranks = [
        statistics.rank_correlation(one.isel(site=at), other.isel(site=at))["of_means"]
        for at in (one["level"].values == level for level in levels)
    ]
    rank = xr.concat(ranks, pd.Index(levels, name="level")) if "example" in one.dims else None
    return Figure(
        "scatter",
        f"{titled(exact)}, against what {attributed.verb} says",
        "A point for each site: across, the mean effect of its exact exchange; upwards, what was attributed to it. "
        "On the line both agree.",
        points,
        (*made_by(run, exact), *made_by(run, attributed)),
        f'import xarray as xr\n\nimport dynamics as dy\n\nexact = dy.results.load("{exact.path.as_posix()}")\n'
        f'attributed = dy.results.load("{attributed.path.as_posix()}")\n'
        'exact, attributed = xr.align(exact, attributed, join="inner")\n'
        "dy.statistics.rank_correlation(exact, attributed)",
        {"chosen": preferred(run)}
        | ({} if rank is None else {"rank": packed(xr.Dataset({"spearman": rank}))}),
    )
