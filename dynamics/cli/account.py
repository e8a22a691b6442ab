"""Say what every step, site and source of data wrote into a run's behaviour, between two of its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dynamics.cli.parsing import CommandError, Parser
from dynamics.cli.runs import open_trained, set_threads_of
from dynamics.config import Level, MeasureName

if TYPE_CHECKING:
    import xarray as xr

SOURCES = ("sets", "integers", "none")
STRETCH = 500
"""Steps of a stretch: what is kept when a command is stopped, and what one worker computes."""


def run(words: Sequence[str]) -> None:
    """`dynamics account RUN`."""
    given = _parser().parse_args(list(words))

    from dynamics import measures, plots, results, sweeps
    from dynamics.sites import LEVELS

    trained = open_trained(given.run, "an account needs")
    set_threads_of(trained)
    phases = sweeps.of_config(trained).config.phases
    *_, start, end = phases.starts.values()
    first = start if given["from"] is None else given["from"]
    last = end if given.to is None else given.to
    if not first < last:
        raise CommandError(f"--from {first} and --to {last}: an account goes from a step to a later one.")
    asked: dict[str, Any] = {
        "sites": lambda model: [site for level in given.levels for site in LEVELS[level](model)],
        "measure": {name: measures.by_name(name) for name in given.measures},
        "sources": _sources(given.sources),
        "every": given.every,
    }
    if given.dry_run:
        print(sweeps.estimate_account(trained, first, last, **asked, workers=given.workers))
        return
    folder = given.out or given.run / "results" / "account"
    found = sweeps.account(
        trained,
        first,
        last,
        **asked,
        stretch=min(given.stretch, last - first),
        out=folder,
        workers=given.workers,
        scheduler=given.scheduler,
    )
    path = folder / f"account-{first}-{last}-{'-'.join(given.levels)}-{given.sources}.h5"
    results.save(found, path, overwrite=True)
    shown = _shown(found, given.levels[0])
    print(_table(shown))
    for name, figure in (("stacked", plots.account(shown)), ("map", _map(shown))):
        if figure is not None:
            plots.save(
                figure, path.with_name(f"{path.stem}-{name}.png"), {"provenance": found.attrs["provenance"]}
            )
    print(f"\n{path} holds the Dataset, beside it are the figures.")


def _sources(name: str) -> Callable[[Any, Any], Sequence[str]] | None:
    """(task, batch) -> labels of its rows."""
    if name == "none":
        return None
    return partial(_labels, by="integer") if name == "integers" else _labels


def _labels(task: Any, batch: Any, by: Literal["set", "integer"] = "set") -> list[str]:
    from dynamics.tasks import AliasTask

    found: list[str] = task.sources(batch, by) if isinstance(task, AliasTask) else task.sources(batch)
    return found


def _shown(found: xr.Dataset, level: str) -> xr.Dataset:
    """One measure, one level and one example, which for aliases is Dt3 less Df4."""
    from dynamics import results

    chosen = found.isel(measure=0, site=found["level"].values == level)
    if {"Dt3", "Df4"} <= set(chosen["example"].values):
        return results.difference(chosen, "Dt3", "Df4")
    return chosen.isel(example=0)


def _table(shown: xr.Dataset) -> str:
    """What each site and each source wrote, those that wrote most first."""
    from dynamics.results.text_tables import aligned

    dims = [dim for dim in ("source", "site") if dim in shown["attribution"].dims]
    first, last = (float(shown["value"].isel(step=i)) for i in (0, -1))
    lines = [
        f"{shown['measure'].item()} of {shown['example'].item()}, steps {int(shown['step'][0])} to "
        f"{int(shown['step'][-1])}: {first:.4g} -> {last:.4g}, a change of {last - first:.4g}; "
        f"sum of residuals {float(shown['residual'].sum()):.2g}, of their sizes "
        f"{float(abs(shown['residual']).sum()):.2g}"
    ]
    for dim in dims:
        written = shown["attribution"].sum([d for d in shown["attribution"].dims if d != dim])
        order = abs(written).values.argsort()[::-1]
        rows = [(str(written[dim].values[i]), float(written[i])) for i in order]
        lines += ["", *aligned([(dim, "wrote"), *rows, ("all", float(written.sum()))])]
    return "\n".join(lines)


def _map(shown: xr.Dataset) -> Any:
    from dynamics import plots

    return plots.account_map(shown) if "source" in shown.dims else None


def _parser() -> Parser:
    parser = Parser(
        prog="dynamics account",
        usage="dynamics account RUN [--from STEP --to STEP] [--levels LEVEL ...] [--sources sets|integers|none]\n"
        "         [--measures NAME ...] [--every N] [--stretch N] [--out FOLDER]\n"
        "         [--workers N | --scheduler ADDRESS] [--dry-run]",
        description="What every step, site and source of data wrote into a run's behaviour between two of its "
        "steps: a table here, the Dataset and two figures in RUN/results/account. It adds up to the whole change. "
        "What is done is kept stretch by stretch; the same command goes on from there.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--from", type=int, help="step it begins at; default: where the last phase begins")
    parser.add_argument("--to", type=int, help="step it ends at; default: where the last phase ends")
    parser.add_argument(
        "--levels",
        choices=get_args(Level),
        nargs="+",
        default=["components"],
        help="of sites; the first is drawn",
    )
    parser.add_argument(
        "--sources",
        choices=SOURCES,
        default="sets",
        help="of the training rows: sets (or facts and letters), each alias's definitions, or none",
    )
    parser.add_argument(
        "--measures",
        choices=get_args(MeasureName),
        nargs="+",
        default=["correct_logit"],
        help="the first is drawn",
    )
    parser.add_argument("--every", type=int, default=1, help="steps summed into one entry")
    parser.add_argument(
        "--stretch",
        type=int,
        default=STRETCH,
        help="steps that are kept together, and computed by one worker",
    )
    parser.add_argument("--out", type=Path, help="where results are kept; default: RUN/results/account")
    parser.add_argument("--workers", type=int, default=0, help="processes to start; 0 works in this one")
    parser.add_argument("--scheduler", type=str, help="a running dask cluster: its address or scheduler file")
    parser.add_argument("--dry-run", action="store_true", help="try five steps, and say what all will take")
    return parser
