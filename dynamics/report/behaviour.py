"""What a run does along training: curves, each example's answers, alignment, and when each of them changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from dynamics import results
from dynamics.comparison import order_of_events, when
from dynamics.plots.curves import SETS
from dynamics.report.figure import Figure, loaded, made_by
from dynamics.report.runs import Result, Run

STYLES = {
    name: {"label": label, "colour": colour, "dash": dash} for name, (label, colour, dash) in SETS.items()
}
"""How curves of the sets are drawn, as in `plots.accuracies`."""

DEFINITION = "definition of alias {}"
"""The source of an alias in an account by integers."""


def curves(run: Run) -> Figure | None:
    """Accuracy and loss of each set of questions over training; None without metrics."""
    if run.curves is None:
        return None
    return Figure(
        "lines",
        "What was trained",
        "Each set of questions over training. "
        + "Vertical lines: where a phase begins. " * bool(run.phases)
        + "Dotted: what a guess scores. " * bool(run.guesses)
        + "Triangles: stored checkpoints; the long line is the one that the slider is at.",
        run.curves,
        (_trained(run),),
        "from io import BytesIO\n\nimport pandas as pd\n\nimport dynamics as dy\n\n"
        f'run = dy.Trajectory.open("{run.folder.as_posix()}")\n'
        'metrics = pd.read_csv(BytesIO(run.read_file("metrics.csv")))\n'
        f"dy.plots.accuracies(metrics, phases={_starts(run)}, chance={dict(run.guesses)})",
        {
            **along_training(run, "example"),
            "guesses": dict(run.guesses) if "accuracy" in run.curves else {},
        },
    )


def _trained(run: Run) -> str:
    command = "study aliases" if "patching" in run.config else "fit"
    return f"dynamics {command} --config {run.folder / 'config.yaml'} --out {run.folder}"


def _starts(run: Run) -> dict[str, int]:
    return {name: step for name, step in run.phases.items() if name != "end"}


def along_training(run: Run, series: str) -> dict[str, Any]:
    """Settings of curves over training: a line for each label of a dim, beside phases and checkpoints."""
    return {"series": series, "styles": STYLES, "phases": _starts(run), "checkpoints": list(run.steps)}


def is_score(dataset: xr.Dataset) -> bool:
    """Whether it has the accuracy of examples along training."""
    return "accuracy" in dataset and set(dataset["accuracy"].dims) == {"step", "example"}


def names_examples(dataset: xr.Dataset) -> bool:
    """Whether its examples are single ones, which have further coordinates, and not whole sets."""
    return any(coord.dims == ("example",) and name != "example" for name, coord in dataset.coords.items())


def scores(run: Run, result: Result) -> Figure:
    """The sets' answers at the checkpoints that were compared."""
    return Figure(
        "lines",
        "Answers at the checkpoints",
        "Each set of questions at each checkpoint that was compared.",
        result.dataset,
        (*made_by(run, result), f"dynamics plot {result.path}"),
        f'{loaded(result, "scores")}\nscores["{{variable}}"].to_pandas()',
        along_training(run, "example"),
    )


def answers(run: Run, result: Result) -> Figure:
    """A row for each example: what it is, its answers before and after the last phase, and when they changed."""
    scored = result.dataset
    steps = scored["step"].values
    start = [*_starts(run).values()][-1] if run.phases else steps[0]
    before = scored.sel(step=steps[steps <= start].max(initial=steps[0]))
    after = scored.isel(step=-1)
    columns = {
        f"{name}_{word}": part[name].drop_vars("step")
        for name in ("accuracy", "correct_logit")
        if name in scored
        for word, part in (("before", before), ("after", after))
    }
    changed = when(scored["accuracy"].transpose("example", "step"))["at"]
    table = xr.Dataset(
        {**columns, "changed_at": changed.assign_attrs(long_name="first change of its accuracy")}
    )
    for name, part in (("before", before), ("after", after)):
        for quantity in ("accuracy", "correct_logit"):
            if f"{quantity}_{name}" in table:
                words = f"{scored[quantity].attrs.get('long_name', quantity)}, step {int(part['step'])}"
                table[f"{quantity}_{name}"].attrs["long_name"] = words
    if "integer" in table.coords:
        table = table.assign(written(run, table["integer"]))
    kind = "alias" if "integer" in table.coords else "example"
    return Figure(
        "table",
        f"Each {kind}",
        f"Its answers at step {int(before['step'])} and at step {int(after['step'])}, and the step at which its "
        "accuracy changed level first (an empty cell: it did not).",
        table,
        made_by(run, result),
        f"{loaded(result, 'scored')}\nscored.isel(step=-1).to_dataframe()\n"
        'dy.comparison.when(scored["accuracy"].transpose("example", "step"))["at"].to_pandas()',
    )


def written(run: Run, integers: xr.DataArray) -> dict[str, xr.DataArray]:
    """What each alias's own definitions wrote into a run's behaviour, where an account by integers was made."""
    for result in run.results:
        account = result.dataset
        if not results.is_account(account) or "source" not in account.dims:
            continue
        wanted = [DEFINITION.format(i) for i in integers.values.tolist()]
        if not set(wanted) & set(account["source"].values.tolist()):
            continue
        account = account.isel(site=account["level"].values == account["level"].values[0])
        account = account.isel(measure=0) if "measure" in account.dims else account
        both = {"Dt3", "Df4"} <= set(account["example"].values.tolist())
        one = results.difference(account, "Dt3", "Df4") if both else account.isel(example=0)
        found = one["attribution"].sum(["step", "site"]).reindex(source=wanted, fill_value=np.nan)
        of = [str(one[n].item()) for n in ("measure", "example") if n in one.coords]
        words = f"what its definitions wrote into {' of '.join(of)}"
        attrs = {"long_name": words, "units": results.units(one, "attribution")}
        return {"written": xr.DataArray(found.values, dims="example", attrs=attrs)}
    return {}


def is_alignment(dataset: xr.Dataset) -> bool:
    """Whether it says how gradients align with probes, along training and by set."""
    return {"own", "within", "across"} <= set(dataset) and "set" in dataset.coords and "step" in dataset.dims


def alignment(run: Run, result: Result) -> Figure:
    """How each set's definitions align with its own questions, those of its set, and those of another."""
    by_set = result.dataset[["own", "within", "across"]].groupby("set").mean("example", keep_attrs=True)
    return Figure(
        "lines",
        "Alignment of gradients" + (", the other tag" if "other" in result.path.stem else ""),
        "Cosine of a definition's gradient with that of questions: its own, others of its set, another set's; the "
        "mean over a set's aliases.",
        by_set,
        (*made_by(run, result), f"dynamics plot {result.path} {{at}}"),
        f"{loaded(result, 'alignment')}\n"
        'by_set = alignment["{variable}"].groupby("set").mean("example")\nby_set.sel({sel}).to_pandas()',
        along_training(run, "set"),
    )


def events(runs: Sequence[Run]) -> Iterator[Figure]:
    """When each set's accuracy changed level; over several runs with intervals, and which came first."""
    seen = [run.curves["accuracy"] for run in runs if run.curves is not None and "accuracy" in run.curves]
    if not seen:
        return
    accuracy = seen[0] if len(seen) == 1 else _over_runs(runs)["accuracy"]
    known = [name for name in accuracy["example"].values if accuracy.sel(example=name).notnull().any()]
    found = when(accuracy.sel(example=known).transpose(..., "example", "step"))
    path = f'"{runs[0].folder.as_posix()}"'
    lines = (
        "from pathlib import Path\n\nimport dynamics as dy\nfrom dynamics.report.runs import open_run\n\n"
        f"run = open_run(Path({path}))\n"
        'dy.comparison.when(run.curves["accuracy"].transpose("example", "step")).to_dataframe()'
    )
    if len(seen) == 1:
        yield Figure(
            "table",
            "When each set's accuracy changed",
            "The step at which the accuracy changes level first (an exact fit of levels; an empty cell: a level "
            "throughout), and the mean after it less the mean before.",
            found,
            (_trained(runs[0]),),
            lines,
        )
        return
    yield Figure(
        "table",
        f"When each set's accuracy changed, {len(seen)} runs",
        "The step of the first change of level: the mean over runs, its 95 % interval, and how many runs have one.",
        found[["mean", "low", "high", "n"]],
        tuple(map(_trained, runs)),
        lines,
    )
    order = order_of_events({str(name): found["at"].sel(example=name).values for name in known})
    pairs = order.stack(pair=("example", "other")).reset_index("pair")
    pairs = pairs.isel(pair=pairs["example"].values < pairs["other"].values)
    yield Figure(
        "table",
        "Which came first",
        "By how many steps the second set's change comes after the first's: the mean over the runs that have both.",
        pairs.rename(example="first", other="second").assign_coords(
            pair=[f"{a}, {b}" for a, b in zip(pairs["example"].values, pairs["other"].values, strict=True)]
        ),
        tuple(map(_trained, runs)),
        lines,
    )


def _over_runs(runs: Sequence[Run]) -> xr.Dataset:
    """The curves of several runs along `seed`, by the names of their folders; NaN where one was not evaluated."""
    kept: Mapping[str, xr.Dataset] = {run.name: run.curves for run in runs if run.curves is not None}
    return xr.concat(
        list(kept.values()), pd.Index(list(kept), name="seed"), join="outer", combine_attrs="override"
    )


def multiples(runs: Sequence[Run]) -> Figure | None:
    """The curves of several runs, a small panel each; None where fewer than two have any."""
    if sum(run.curves is not None for run in runs) < 2:
        return None
    settings = along_training(runs[0], "example")
    return Figure(
        "multiples",
        "Every run",
        "One panel a run, on the same axes.",
        _over_runs(runs),
        tuple(map(_trained, runs)),
        "\n".join(
            [
                "from pathlib import Path\n\nfrom dynamics.report.runs import open_run\n",
                f"folders = {[run.folder.as_posix() for run in runs]}",
                "curves = {folder: open_run(Path(folder)).curves for folder in folders}",
            ]
        ),
        {**settings, "panels": "seed", "guesses": dict(runs[0].guesses)},
    )
