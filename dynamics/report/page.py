"""The page: which sections the runs have data for, and one HTML file that holds them all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined

from dynamics import results, statistics
from dynamics.report import accounts, behaviour, effects
from dynamics.report.figure import Figure, Section, made_by
from dynamics.report.packing import plain
from dynamics.report.runs import Result, Run, open_run
from dynamics.results.files import replacing


def write(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    beside: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> Path:
    """Make one HTML file of runs: curves, maps, tables, accounts, and where all of it comes from.

    It opens without a network and holds its data. Sections that a run has no data for are left out. With several
    runs, the first is shown in full and all of them beside each other. The runs are read and not changed.

    Args:
        runs: folders of runs, at least one; results are read from RUN/results.
        out: the file, .html.
        beside: further files or folders of results, of the first run.
        overwrite: replace a file that is there.

    Returns:
        The file.

    Raises:
        FileExistsError: there is a file, and overwrite is not set.
        TrajectoryError: a folder holds no run.
        ResultsError: a file of results is damaged.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(
            f"{out} exists. Choose another name, or replace it: overwrite=True, --overwrite."
        )
    extra = [Path(path) for path in beside]
    opened = [open_run(Path(folder), extra if i == 0 else ()) for i, folder in enumerate(runs)]
    text = html(opened, out)
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out


def html(runs: Sequence[Run], out: Path = Path("report.html")) -> str:
    """The text of the page.

    Args:
        runs: at least one, as `open_run` reads them.
        out: the name that the command shown on the page gives the file.
    """
    environment = Environment(
        loader=PackageLoader("dynamics.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    title = f"Report of {', '.join(run.name for run in runs[:3])}"
    title += f" and {len(runs) - 3} more runs" if len(runs) > 3 else ""
    return environment.get_template("page.html").render(
        title=title, facts=facts(runs[0]), data=content(runs, out), command=command(runs, out)
    )


def command(runs: Sequence[Run], out: Path) -> str:
    """What makes the page."""
    return f"dynamics report {' '.join(str(run.folder) for run in runs)} -o {out}"


def content(runs: Sequence[Run], out: Path = Path("report.html")) -> dict[str, Any]:
    """All that the page draws, as plain data: `sections`, the slider's `steps`, `phases` and the ten `checks`."""
    first = runs[0]
    found = [section for section in sections(runs) if section.figures]
    return {
        "sections": [section.to_json() for section in found],
        "steps": slider(first, found),
        "phases": dict(first.phases),
        "checks": checks(first.results),
        "command": command(runs, out),
    }


def slider(run: Run, found: Iterable[Section]) -> list[int]:
    """The steps that the slider goes through: stored checkpoints, and the steps of maps."""
    of_maps = {
        step
        for section in found
        for figure in section.figures
        if figure.kind in ("map", "scatter") and "step" in figure.dataset.dims
        for step in figure.dataset["step"].values.tolist()
    }
    return sorted({*run.steps, *of_maps})


def sections(runs: Sequence[Run]) -> Iterator[Section]:
    """Every section, some without a picture."""
    first = runs[0]
    drawn: set[Path] = set()

    def chosen(wanted: Iterable[Result]) -> list[Result]:
        found = list(wanted)
        drawn.update(result.path for result in found)
        return found

    scored = [r for r in first.results if behaviour.is_score(r.dataset)]
    sets = chosen(r for r in scored if not behaviour.names_examples(r.dataset))
    singles = chosen(r for r in scored if behaviour.names_examples(r.dataset))
    mapped = [r for r in first.results if effects.can_be_mapped(r.dataset)]
    crossed = chosen(r for r in mapped if effects.is_transfer(r.dataset))
    mapped = chosen(r for r in mapped if not effects.is_transfer(r.dataset))
    order = list(effects.VERBS)
    mapped.sort(key=lambda r: order.index(r.verb) if r.verb in order else len(order))
    of_effects = [
        r for r in mapped if {"effect", "attribution"} & set(r.dataset) or statistics.is_summary(r.dataset)
    ]
    told = chosen(r for r in first.results if results.is_account(r.dataset))
    aligned = chosen(r for r in first.results if behaviour.is_alignment(r.dataset))
    asked = chosen(r for r in first.results if is_checks(r.dataset))

    yield Section(
        "Training",
        "How the run came to behave as it does. The slider at the top of the page moves every map below.",
        tuple(filter(None, [behaviour.curves(first), *(behaviour.scores(first, r) for r in sets)])),
    )
    yield Section(
        "Where it is: maps of sites",
        "What one site does when a quantity is exchanged, or what is attributed to it.",
        tuple(effects.site_map(first, r) for r in of_effects),
    )
    yield Section(
        "Ten checks",
        "Whether a site is where training changed the behaviour, as `dynamics believe` asks it.",
        tuple(check_table(first, r) for r in asked),
    )
    yield Section(
        "Exact against attributed",
        "How far the quick attribution orders sites as the exact exchange does.",
        tuple(effects.agreements(first, first.results)),
    )
    yield Section(
        "Every example",
        "What was asked, what was answered, and when that changed.",
        tuple(behaviour.answers(first, r) for r in singles),
    )
    yield Section(
        "Transfer between checkpoints",
        "What the run has at one step that it lacks at another, and where.",
        tuple(effects.transfer(first, r) for r in crossed),
    )
    yield Section(
        "The account",
        "What every step, site and source of data wrote into the measure, along the path that training took.",
        tuple(figure for r in told for figure in accounts.stacks(first, r)),
    )
    yield Section(
        "What changed along training",
        "Weights, activations, attention and steps, from one checkpoint to the next.",
        tuple(effects.site_map(first, r) for r in mapped if r not in of_effects),
    )
    yield Section(
        "Alignment and order of events",
        "When the sets' gradients came to point the same way, and when their answers changed.",
        (*(behaviour.alignment(first, r) for r in aligned), *behaviour.events(runs)),
    )
    yield Section(
        "Over runs",
        "All the runs that were given, beside each other.",
        tuple(filter(None, [behaviour.multiples(runs), *over_runs(runs)])),
    )
    yield Section(
        "Provenance",
        "Every file that was read, and what made it.",
        tuple(filter(None, [provenance(first, drawn)])),
    )


def over_runs(runs: Sequence[Run]) -> Iterator[Figure]:
    """Maps over runs of what every one of them was asked alike: the run is the unit."""
    for result in runs[0].results:
        alike = [next((r for r in run.results if _alike(r, result)), None) for run in runs]
        if (
            len(runs) < 2
            or not statistics.can_be_summarised(result.dataset)
            or "example" not in result.dataset.dims
        ):
            continue
        found = [r for r in alike if r is not None]
        if len(found) < 2:
            continue
        labels = [run.name for run, r in zip(runs, alike, strict=True) if r is not None]
        names = [n for n in ("effect", "attribution", "base", "source") if n in result.dataset]
        parts = [r.dataset[names].mean("example", keep_attrs=True) for r in found]
        joined = results.concat(parts, "seed", labels)
        paths = ", ".join(f'"{r.path.as_posix()}"' for r in found)
        yield Figure(
            "map",
            f"{effects.titled(result)}: {len(found)} runs",
            "The mean over runs, each the mean over its examples; unit: run.",
            statistics.summarize(joined),
            made_by(runs[0], result),
            f"import dynamics as dy\n\nruns = [dy.results.load(path) for path in ({paths})]\n"
            f'joined = dy.results.concat([run[{names}].mean("example", keep_attrs=True) for run in runs], "seed", '
            f"{labels})\nsummary = dy.statistics.summarize(joined).sel({{sel}})\n"
            'chosen = summary.isel(site=summary["level"].values == "{level}")\ndy.plots.{draw}(chosen)',
            {"variables": ["effect"], "layouts": ["grid", "columns"], "chosen": effects.preferred(runs[0])},
        )


def _alike(one: Result, other: Result) -> bool:
    """Whether two results ask the same of two runs."""
    return (
        one.verb == other.verb
        and {**one.dataset.sizes, "example": 0} == {**other.dataset.sizes, "example": 0}
        and all(
            np.array_equal(one.dataset[dim].values, other.dataset[dim].values)
            for dim in one.dataset.dims
            if dim != "example"
        )
    )


# --- the ten checks, and where everything comes from -------------------------------------------------------


def is_checks(dataset: xr.Dataset) -> bool:
    """Whether it holds the ten checks of a site."""
    return {"verdict", "figure"} <= set(dataset) and "check" in dataset.dims


def checks(found: Iterable[Result]) -> list[dict[str, Any]]:
    """The ten checks of each site that was asked: `site`, where it was asked, and `checks`."""
    return [
        {
            "site": str(r.dataset.attrs["site"]),
            "at": str(r.dataset.attrs["at"]),
            "checks": [
                {"name": name, "verdict": verdict, "figure": figure}
                for name, verdict, figure in zip(
                    *(plain(r.dataset[key].values) for key in ("check", "verdict", "figure")), strict=True
                )
            ],
        }
        for r in found
        if is_checks(r.dataset)
    ]


def check_table(run: Run, result: Result) -> Figure:
    """The ten checks of one site as a table."""
    return Figure(
        "table",
        f"{result.dataset.attrs['site']}, {result.dataset.attrs['at']}",
        "Open: the interval includes zero, or the check cannot be made. A dash: for the reader to weigh.",
        result.dataset,
        (f'dynamics believe {run.folder} --site "{result.dataset.attrs["site"]}" --out {result.path}',),
        f'import dynamics as dy\n\ndy.results.load("{result.path.as_posix()}").to_dataframe()',
    )


def provenance(run: Run, drawn: set[Path]) -> Figure | None:
    """A row for each file of results: what found it, when, at which commit, and whether it is drawn above."""
    if not run.results:
        return None
    rows = [
        {
            "file": _below(run, result.path),
            "found by": result.verb,
            "holds": ", ".join(f"{size} {dim}" for dim, size in result.dataset.sizes.items()),
            "date": str(result.facts.get("date", ""))[:10],
            "commit": str(result.facts.get("commit", ""))[:10]
            + (" and changes" * bool(result.facts.get("modified"))),
            "on this page": "drawn" if result.path in drawn else "listed only",
            "versions": ", ".join(
                f"{name} {version}" for name, version in result.facts.get("versions", {}).items()
            ),
        }
        for result in run.results
    ]
    table = pd.DataFrame(rows).set_index("file").to_xarray().astype(np.str_)
    return Figure(
        "table",
        "Files of results",
        "Each of them is a netCDF file that any program for HDF5 opens.",
        table.assign_coords(file=table["file"].astype(np.str_)),
        tuple(f"dynamics show {result.path}" for result in run.results[:1]),
        f'import dynamics as dy\n\ndy.results.load("{run.results[0].path.as_posix()}").attrs["provenance"]',
    )


def _below(run: Run, path: Path) -> str:
    """The name of a file in its run's folder, elsewhere its path."""
    return str(path.relative_to(run.folder) if path.is_relative_to(run.folder) else path)


def facts(run: Run) -> dict[str, str]:
    """The run in a few words, and its whole config."""
    versions = run.provenance.get("versions", {})
    known = {
        "run": str(run.folder),
        "phases": ", ".join(
            f"{name} from step {step}" if name != "end" else f"end at step {step}"
            for name, step in run.phases.items()
        ),
        "checkpoints": f"{len(run.steps)}"
        + (f", steps {run.steps[0]} to {run.steps[-1]}" if run.steps else ""),
        "trained": str(run.provenance.get("date", ""))[:10],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": str(run.provenance.get("commit", "")),
        "config": json.dumps(run.config, indent=1, default=str) if run.config else "",
    }
    return {name: words for name, words in known.items() if words}
