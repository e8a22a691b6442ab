"""Where and when is a fact read, and where was it written? About 25 minutes for twelve runs and one of aliases.

Activation patching above gradient patching on one time axis, in runs of `facts` and one of the aliases. At
every step of the stretch in which late facts (aliases of X2) are learnt:

- read: `patch_activations` puts what each head, MLP and the embedding gives for the subject asked about into
  the same question about another subject, at the checkpoint before the step. How much of the answer comes back?
- written: `patch_gradients` takes the step on the training batch with another, known statement in the place of
  the fact's own, and each place's gradient from the batch as it was. How much more of the answer, on questions
  of other wording, is there after the step? Steps whose batch does not state the fact wrote nothing of it.

Both in the correct answer's logit less the mean logit. The optimizer's state is the run's own.

    .venv/bin/python scripts/experiments/writes_and_reads.py runs/languages/facts-* --aliases runs/aliases --readme
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

import dynamics as dy
from checkpoints import Trajectory
from dynamics.plots import figures
from dynamics.plots.figures import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.into_readme import conclude, correlation_interval, interval, markdown, stamp
from scripts.shared.runs import parser_of_runs

MEASURE = dy.measures.centred_logit
FACT_STEPS = range(64)
"""Of the phase `late`, counted from its first: by the last of them the late facts are known."""
N_FACTS = 2
"""Of each run."""
ALIAS_STEPS = range(600)
"""Of X2: those of them whose batch defines the alias."""
N_ALIASES = 4
"""Of Dt3: those whose questions are answered best after the stretch. Else nothing can be read."""

Array = npt.NDArray[np.float64]


# --- what is asked ----------------------------------------------------------------------------------------


def facts_asked(task: Any, step: int) -> list[dy.Contrast]:
    """Late facts' questions about another subject (base) and about their own (source)."""
    return task.contrasts(facts=task.late[:N_FACTS])  # type: ignore[no-any-return]


def facts_stated(task: Any, step: int) -> list[dy.Contrast]:
    """The step's batch with another fact in the statement's place (base) and as it was (source)."""
    return task.statements_at(step)[:N_FACTS]  # type: ignore[no-any-return]


def alias_asked(task: dy.tasks.AliasTask, step: int, integer: int) -> list[dy.Contrast]:
    """An alias's untrained questions about another alias (base) and about its own (source)."""
    (own,) = (c for c in task.contrasts(["Dt3"]) if c.coords["integer"] == integer)
    other = task.alias(_another(task, integer))
    tokens = torch.where(own.probe.tokens == task.alias(integer), other, own.probe.tokens)
    return [replace(own, base=replace(own.probe, tokens=tokens), source=own.probe, probe=None)]


def alias_defined(task: dy.tasks.AliasTask, step: int, integer: int) -> list[dy.Contrast]:
    """The step's batch with another definition in the alias's place (base) and as it was (source)."""
    (own,) = (c for c in task.contrasts(["Dt3"]) if c.coords["integer"] == integer)
    drawn, other = task.batch(step), task.definition(_another(task, integer), "reliable")
    index = torch.where(_defines(task, step, integer), 0, torch.arange(1, len(drawn) + 1))
    base = dy.Batch(*(torch.cat([getattr(b, n) for b in (other, drawn)])[index] for n in _COLUMNS))
    return [replace(own, base=base, source=drawn, coords={**own.coords, "in_batch": 1})]


_COLUMNS = ("tokens", "target_pos", "targets")


def _defines(task: dy.tasks.AliasTask, step: int, integer: int) -> torch.Tensor:
    """Which rows of a step's batch define an alias: bool [batch]."""
    return (task.batch(step).tokens == task.definition(integer, "reliable").tokens).all(1)


def _another(task: dy.tasks.AliasTask, integer: int) -> int:
    """The alias asked about, or defined, in an alias's place: the next one of its set."""
    members = task.sets["Dt3"]
    return members[(members.index(integer) + 1) % len(members)]


def best_aliases(run: Trajectory, task: dy.tasks.AliasTask, step: int) -> list[int]:
    """Those of Dt3 whose questions are answered best at a stored step."""
    asked = [dy.Contrast(c.probe, c.probe, coords=c.coords) for c in task.contrasts(["Dt3"])]
    recipe = task.recipe()
    anywhere = dy.sites.activations(recipe.model, "hook_embed")
    right = dy.patch_activations(recipe, run.at(step), asked, anywhere, dy.measures.accuracy)["base"]
    order = np.argsort(-right.values, kind="stable")[:N_ALIASES]
    return [int(right["integer"].values[i]) for i in order]


# --- where ------------------------------------------------------------------------------------------------


def readers(model: nn.Module, like: dy.Batch) -> list[dy.sites.Site]:
    """What the embedding, every head and every MLP gives, called as in `writers`."""
    found = [replace(dy.sites.activations(model, "hook_embed")[0], label="embed")]
    found += [
        replace(site, label=f"L{site.coords['layer']}H{site.coords['head']}")
        for site in dy.sites.activations(model, "blocks.*.attn.hook_z", by=("layer", "head"), like=like)
    ]
    found += [
        replace(site, label=f"mlp {site.coords['layer']}")
        for site in dy.sites.activations(model, "blocks.*.hook_mlp_out")
    ]
    return found


def writers(model: nn.Module) -> list[dy.sites.Site]:
    """Parameters of the embedding, every head and every MLP."""
    parts = {site.label: site for site in dy.sites.components(model)}
    mlps = [site for label, site in parts.items() if label.startswith("mlp")]
    return [parts["embed"], *dy.sites.heads(model), *mlps]


@dataclass(frozen=True)
class Story:
    """What was found for the facts or aliases of some runs.

    Attributes:
        name: "fact" or "alias".
        read: [seed, step, example, site]; its `source` and `base` are the question as asked and about another.
        written: the same dims; zero where the batch does not state it.
        start: first step of the phase.
    """

    name: str
    start: int
    read: xr.Dataset
    written: xr.Dataset

    def of(self, **selection: int) -> tuple[xr.DataArray, xr.DataArray]:
        """What one example's places restore before each step, and what they have written by then: [step, site]."""
        read = self.read["effect"].isel(selection)
        written = self.written["effect"].isel(selection)
        return read, written.cumsum("step").shift(step=1, fill_value=0.0)

    @property
    def grown(self) -> xr.DataArray:
        """By how much more a place restores at the end than at the beginning, three points each."""
        effect = self.read["effect"]
        ends = effect.isel(step=slice(-3, None)).mean("step"), effect.isel(step=slice(0, 3)).mean("step")
        return ends[0] - ends[1]


def story(
    name: str,
    start: int,
    runs: Sequence[Trajectory],
    steps: Sequence[int],
    asked: Callable[..., list[dy.Contrast]],
    stated: Callable[..., list[dy.Contrast]],
    out: Path,
) -> Story:
    """Both verbs over training; what is computed is kept under `out`."""
    like = asked(dy.tasks.load(runs[0].config), steps[0])[0].base
    read = dy.sweep(dy.patch_activations, runs, steps, asked, partial(readers, like=like), MEASURE, out=out)
    written = dy.sweep(dy.patch_gradients, runs, steps, stated, writers, MEASURE, out=out)
    here = written["in_batch"].broadcast_like(written["base"])
    return Story(
        name,
        start,
        read,
        written.assign(
            effect=written["effect"] * here, gap=(written["source"] - written["base"]) * here
        ).transpose("seed", "step", "example", "site"),
    )


# --- table ------------------------------------------------------------------------------------------------


def half(across: Array, curve: Array) -> float:
    """Where a curve first stands half way between its first and its last value, both means of three points."""
    start, end = curve[:3].mean(), curve[-3:].mean()
    beyond = (curve - start) * np.sign(end - start) >= abs(end - start) / 2
    return float(across[np.argmax(beyond)]) if beyond.any() else float("nan")


def compared(found: Story) -> dict[str, Array]:
    """For each run, its examples' mean: how alike the places are, and how long after the writes the reads come."""
    across = found.read["step"].values.astype(float)
    columns: dict[str, list[float]] = {"alike": [], "heads": [], "lag": [], "lag at its head": []}
    for seed, example in np.ndindex(found.read.sizes["seed"], found.read.sizes["example"]):
        pair = {"seed": seed, "example": example}
        read, written = found.of(**pair)
        grown, total = found.grown.isel(pair).values, written.isel(step=-1).values
        heads = np.flatnonzero(read["head"].values >= 0)
        columns["alike"].append(spearmanr(grown, total).statistic)
        columns["heads"].append(spearmanr(grown[heads], total[heads]).statistic)
        answer = (found.read["source"] - found.read["base"]).isel(pair).values
        wrote = np.concatenate([[0.0], found.written["gap"].isel(pair).values.cumsum()[:-1]])
        columns["lag"].append(half(across, answer) - half(across, wrote))
        best = heads[int(np.argmax(grown[heads]))]
        own = half(across, read.values[:, best]) - half(across, written.values[:, best])
        columns["lag at its head"].append(own)
    shape = found.read.sizes["seed"], found.read.sizes["example"]
    known = {name: np.ma.masked_invalid(values).reshape(shape) for name, values in columns.items()}
    return {name: values.mean(1).filled(np.nan) for name, values in known.items()}


def places(parts: Sequence[xr.DataArray], n: int = 4) -> str:
    """The kinds of places that hold most, as shares of the sum over places, over all examples and runs."""
    mean = sum(part.mean([d for d in part.dims if d != "site"]) for part in parts)
    kinds: dict[str, float] = {}
    for label, value in zip(mean["site"].values.tolist(), mean.values.tolist(), strict=True):
        kind = f"heads {label[1]}" if label.startswith("L") else label
        kinds[kind] = kinds.get(kind, 0.0) + value
    total = sum(kinds.values())
    order = sorted(kinds, key=lambda kind: -kinds[kind])[:n]
    return ", ".join(f"{kind} {kinds[kind] / total:.2f}" for kind in order)


def report(found: Sequence[Story]) -> str:
    """A line for facts and one for aliases."""
    intervals = {"alike": correlation_interval, "heads": correlation_interval}
    head = ["", "n", "written in, share", "read from, share"]
    head += ["writes and reads over places: ρ", "over heads alone: ρ"]
    head += ["half read − half written, steps", "the same at the head that restores most"]
    rows = []
    for name in dict.fromkeys(one.name for one in found):
        stories = [one for one in found if one.name == name]
        each = [compared(one) for one in stories]
        columns = {key: np.concatenate([one[key] for one in each]) for key in each[0]}
        rows.append(
            [
                name,
                f"{len(columns['alike'])}",
                places([one.written["effect"].sum("step") for one in stories]),
                places([one.grown for one in stories]),
                *(
                    intervals.get(key, interval)(column[np.isfinite(column)])
                    for key, column in columns.items()
                ),
            ]
        )
    caption = (
        "n: runs, each the mean of its facts, or aliases of one run, the units of the intervals (mean [95 % t "
        "interval]). Shares of the sum over places; heads of a layer together. Read: growth over the stretch of "
        "what the place restores; written: sum over its steps. ρ: Spearman's over places, of one fact's writes and "
        "reads, its interval on Fisher's scale. Half: the step where half of the final value is there. Exchanging "
        "the embedding is asking about the other subject altogether, so as a reader it restores the whole "
        "difference by construction. "
        f"{stamp(__file__)}"
    )
    return "\n".join([*markdown(head, rows), "", caption])


# --- figure -----------------------------------------------------------------------------------------------


@figures.styled
def figure(found: Sequence[Story]) -> Figure:
    """The first example of each story: the answer, what every place restores, and what it has written so far."""
    drawn = Figure(figsize=(5.2 * len(found), 6.8))
    grid = drawn.subplots(3, len(found), sharex="col", squeeze=False, height_ratios=(1, 2, 2))
    for column, one in zip(grid.T, found, strict=True):
        pick = {"seed": 0, "example": 0}
        read, written = one.of(**pick)
        steps = read["step"].values - one.start
        for name, key, color in (
            ("asked about it", "source", figures.VERMILLION),
            ("asked about another", "base", figures.GREY),
        ):
            column[0].plot(steps, one.read[key].isel(pick).values, color=color, label=name)
        names = one.read["label" if "label" in one.read.coords else "example"]
        column[0].set(title=str(names.values.flat[0]))
        for axes, values, title in (
            (column[1], read, "read: what the place restores"),
            (column[2], written, "written in the place so far"),
        ):
            reach = float(np.abs(values).max()) or 1.0
            mesh = axes.pcolormesh(
                steps,
                np.arange(values.sizes["site"]),
                values.values.T,
                cmap="RdBu_r",
                vmin=-reach,
                vmax=reach,
            )
            axes.set_yticks(np.arange(values.sizes["site"]), values["site"].values, fontsize=6.5)
            axes.invert_yaxis()
            axes.set_ylabel(title)
            drawn.colorbar(mesh, ax=axes, label="logit", pad=0.01)
        column[2].set_xlabel("step of the phase")
    grid[0, 0].set_ylabel("its answer (logit)")
    drawn.suptitle(
        f"Where one {' and one '.join(one.name for one in found)} are read and written, step by step"
    )
    drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawn


def within(task: Any, phase: str, steps: range) -> list[int]:
    """Steps of a phase, by their place in the run, as far as it goes."""
    starts = task.config.phases.starts
    return [starts[phase] + n for n in steps if starts[phase] + n < starts["end"]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of_runs(__doc__, "writes", "folders of runs of the task facts")
    parser.add_argument("--aliases", type=Path, required=True, help="folder of a run of the aliases")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("error")
    facts, aliases = [Trajectory.open(folder) for folder in given.runs], Trajectory.open(given.aliases)
    task = dy.tasks.load(aliases.config)
    stretch = within(dy.tasks.load(facts[0].config), "late", FACT_STEPS)
    asked: list[tuple[Any, ...]] = [("fact", stretch[0], facts, stretch, facts_asked, facts_stated)]
    stretch = within(task, "x2", ALIAS_STEPS)
    for integer in best_aliases(aliases, task, aliases.nearest(stretch[-1]).step):
        steps = [step for step in stretch if bool(_defines(task, step, integer).any())]
        functions = (partial(function, integer=integer) for function in (alias_asked, alias_defined))
        asked.append(("alias", stretch[0], [aliases], steps, *functions))
    found = [story(*one, given.out) for one in tqdm(asked, desc="stories", unit="story")]
    conclude(given, "writes", report(found), figure(found[:2]))


if __name__ == "__main__":
    main()
