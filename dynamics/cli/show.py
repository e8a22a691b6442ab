"""List what a run holds, or print the summary of a file of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

from dynamics.cli import datasets
from dynamics.cli.parsing import CommandError, Parser
from dynamics.config import RunConfig, read, task_name

if TYPE_CHECKING:
    import xarray as xr

    from checkpoints import Trajectory

WIDTH = 110


def run(words: Sequence[str]) -> None:
    """`dynamics show RUN [--sites]`, `dynamics show FILE.h5 [--at NAME=VALUE ...]`."""
    parser = Parser(
        prog="dynamics show",
        usage="dynamics show RUN [--sites]\n       dynamics show FILE.h5 [--at NAME=VALUE ...]",
        description="Of a run: its task, phases, stored steps, results, figures and size, or the sites of its "
        "model. Of a file of results: the summary table of one value of each dim, or what it holds.",
    )
    parser.add_argument("path", type=Path, metavar="RUN|FILE.h5", help="a run's folder, or a file of results")
    parser.add_argument("--sites", action="store_true", help="of a run: the sites of its model, by level")
    datasets.add_at(parser)
    given = parser.parse_args(list(words))
    if given.sites and given.at:
        raise CommandError("--sites is of a run, --at of a file of results; give one of them.")
    if given.path.is_file():
        if given.sites:
            raise CommandError(f"--sites is of a run, and {given.path} is a file. Give the run's folder.")
        _show_file(given.path, given.at)
        return
    if given.at:
        raise CommandError(
            f"--at is of a file of results, and {given.path} is none. Give a file of RUN/results."
        )
    from checkpoints import Trajectory

    trajectory = Trajectory.open(given.path)
    named = _sites(trajectory) if given.sites else _contents(trajectory)
    _print_columns(named)


def _print_columns(named: Mapping[str, Iterable[str]]) -> None:
    """A name beside its lines; long ones go on below, broken between the items of a list alone."""
    width = max(map(len, named)) + 2
    fold = TextWrapper(WIDTH - width, subsequent_indent="  ", break_on_hyphens=False)
    for name, lines in named.items():
        kept = (", ".join(item.replace(" ", "\u00a0") for item in line.split(", ")) for line in lines)
        for i, part in enumerate(part for each in kept for part in fold.wrap(each)):
            print(f"{name if i == 0 else '':<{width}}{part}".replace("\u00a0", " "))


# --- runs -------------------------------------------------------------------------------------------------


def _contents(trajectory: Trajectory) -> dict[str, list[str]]:
    """What a run's folder holds, under a word each."""
    folder = trajectory.path
    config = read(trajectory.config) if task_name(trajectory.config) else None
    figures = sorted((folder / "figures").rglob("*.png"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "run": [str(folder)],
        "task": [_task(trajectory)],
        **({"phases": [_phases(config)]} if config else {"config": [_flat(trajectory.config) or "empty"]}),
        "checkpoints": [
            f"{len(trajectory)} at steps {_ranges(trajectory.steps)}" if len(trajectory) else "none"
        ],
        "results": _results(folder) or ["none"],
        "figures": [", ".join(str(path.relative_to(folder)) for path in figures) or "none"],
        "size": [f"{sum(path.stat().st_size for path in files) / 1e6:,.1f} MB in {len(files)} files"],
    }


def _task(trajectory: Trajectory) -> str:
    if imported := trajectory.provenance.get("imported"):
        sources = [source["name"] for source in imported["sources"]]
        return f"not known: imported from {len(sources)} {imported['kind']}, the first {sources[0]}"
    config = trajectory.config
    if name := task_name(config):
        return f"{name}, seed {read(config).seed}"
    return "not known: the config names no task of this toolkit, so this is a run of another training loop"


def _phases(config: RunConfig) -> str:
    starts = config.phases.starts
    ends = [*starts.values()][1:]
    return ", ".join(
        f"{name} {first} to {end - 1}" for (name, first), end in zip(starts.items(), ends, strict=False)
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> str:
    """A config of whatever keys on one line."""
    return ", ".join(
        _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else f"{prefix}{key} {value}"
        for key, value in config.items()
    )


def _ranges(steps: Sequence[int]) -> str:
    """Steps with neighbours joined: `0-3, 6, 10`."""
    joined: list[list[int]] = []
    for step in steps:
        if joined and step == joined[-1][-1] + 1:
            joined[-1].append(step)
        else:
            joined.append([step])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in joined)


def _results(folder: Path) -> list[str]:
    """A line for each file of results; where a link leads out of the run's folder, what is wrong with it."""
    from dynamics import results

    try:
        return [f"{path.relative_to(folder)}: {_sizes(path)}" for path in results.files_of(folder)]
    except results.ResultsError as error:
        return [f"not readable: {error}"]


def _sizes(path: Path) -> str:
    """The dims of a file of results, by its header alone once its checksum is verified."""
    import xarray as xr

    from dynamics import results

    try:
        results.verify(path)
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False, decode_timedelta=False) as dataset:
            return ", ".join(f"{size} {dim}" for dim, size in dataset.sizes.items())
    except (OSError, results.ResultsError) as error:
        return f"not readable: {error}"


def _sites(trajectory: Trajectory) -> dict[str, list[str]]:
    """The labels of the sites of a run's model, by level; of a model that is not known its parameters."""
    if task_name(trajectory.config) is None:
        shapes = {name: list(tensor.shape) for name, tensor in trajectory.last.parameters.items()}
        return {
            "levels": ["not known: they follow from the model, and no task says which it is"],
            "parameters": [f"{name} {shape}" for name, shape in shapes.items()],
            "in Python": [
                "dynamics.sites.parameters(model), .matching(model, {label: glob}), .heads(model), ..."
            ],
        }
    from dynamics import tasks
    from dynamics.sites import LEVELS

    model = tasks.load(trajectory.config).recipe().model
    return {name: [", ".join(site.label for site in level(model))] for name, level in LEVELS.items()}


# --- files of results -------------------------------------------------------------------------------------


def _show_file(path: Path, asked: Sequence[str]) -> None:
    """The summary table of a result, or of another Dataset what it holds."""
    from dynamics import statistics

    dataset = datasets.load(path)
    print(f"{path}: {', '.join(f'{size} {dim}' for dim, size in dataset.sizes.items())}")
    dataset = datasets.at(dataset, asked)
    if statistics.is_summary(dataset) or statistics.can_be_summarised(dataset):
        chosen, words = datasets.first_of_others(dataset, ("site", "example", "seed"))
        if words:
            print(f"at {', '.join(words)}")
        summary = chosen if statistics.is_summary(chosen) else statistics.summarize(chosen)
        print(statistics.table(summary))
        return
    variables = {str(name): array for name, array in dataset.data_vars.items()}
    coordinates = {str(name): array for name, array in dataset.coords.items()}
    _print_columns({name: [_described(array)] for name, array in {**variables, **coordinates}.items()})


def _described(array: xr.DataArray) -> str:
    """The dims of a variable, what it is, its units, and from where to where it goes."""
    dims = f"[{', '.join(map(str, array.dims))}]"
    units = array.attrs.get("units", "1")
    said = [array.attrs.get("long_name", ""), f"({units})" if units != "1" else ""]
    if array.dtype.kind in "iuf":
        known = array.values[array.notnull().values]
        said.append(f"{known.min():.3g} to {known.max():.3g}" if known.size else "no number")
    else:
        said.append(", ".join(dict.fromkeys(array.values.astype(str).ravel().tolist())))
    return " ".join([dims, *filter(None, said)])
