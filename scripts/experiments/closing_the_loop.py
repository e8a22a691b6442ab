"""Is the difference gone where it was localised, and only there? About 8 minutes a fork, on one core.

Runs of scripts/experiments/runs.py, both forks of each seed; docs/analyses/truth.md, question 6. From the first
steps of X2 a tenth of the matrices is chosen, those whose gradients' tags move D = Dt3 − Df4 most (`patch_window`
over recorded batches). X2 is then trained again from the same checkpoint with the tag's gradient difference erased
in them, everywhere, or in random matrices with as many parameters and as large a difference. There are several ways
of choosing; the seeds explored settle which one does best, and that one alone is run on the seeds that confirm.
As it missed the embedding there in ten of 24 forks, one that looks further ahead is run once on the seeds explored.

    .venv/bin/python scripts/experiments/closing_the_loop.py ../runs-400 --workers 2 --readme
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

import dynamics as dy
from checkpoints import Checkpoint, Trajectory
from dynamics import results
from dynamics.recipe import Recipe
from dynamics.sites import Site
from dynamics.tasks import AliasTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared.difference import difference
from scripts.shared.forks import CONFIRMED, EXPLORED, Found, command_line, of_seeds, seeds_said
from scripts.shared.into_readme import conclude, interval, markdown, stamp

STEPS = 500
"""Of X2, trained again."""
SHARE = 0.1
CANDIDATES = 16
"""Matrices, those that move most alone, among which a set is chosen together."""
N_RANDOM = 2
GOALS = {"chosen": 0.8, "random": 0.2}
"""Of D gone: at least, and at most."""
MEASURES = {"accuracy": dy.measures.accuracy, "correct_logit": dy.measures.correct_logit}
PRIMARY = "correct_logit"

Array = npt.NDArray[np.float64]


class Way(NamedTuple):
    """How matrices are chosen.

    Attributes:
        choose: "alone", by what each moves alone; "together", one after another by what it moves with those before.
        look: the first steps of X2 that the choice may look at.
    """

    choose: str
    look: int

    def __str__(self) -> str:
        return f"{self.choose}, {self.look} steps"


WAYS = (Way("alone", 10), Way("together", 10), Way("together", 30))
LATER = Way("alone", 50)
"""Made up after the seeds that confirm were seen, and run once on all seeds explored."""
EMBEDDING = "W_E"


def squared(tensors: dict[str, torch.Tensor], site: Site) -> float:
    """Σ x² over what a site covers."""
    return sum(float(tensors[name][index].double().square().sum()) for name, index in site.covers.items())


def chosen_and_random(
    recipe: Recipe, start: Checkpoint, task: AliasTask, way: Way
) -> tuple[list[Site], list[list[Site]], list[tuple[float, float]]]:
    """The matrices that move D most, random sets of others, and how well these match in size and ‖Δ‖."""
    matrices = dy.sites.matrices(recipe.model)
    base = [task.batch(start.step + n) for n in range(way.look)]
    source = [task.retag(batch) for batch in base]
    measure, probe = difference(task)

    def moves(sites: list[Site]) -> Array:
        contrast = dy.Contrast(base, source, probe)
        found: Array = dy.patch_window(recipe, start, [contrast], sites, measure)["effect"].values
        return np.abs(found.reshape(len(sites)))

    n_top = round(SHARE * len(matrices))
    order = np.argsort(-moves(matrices))
    if way.choose == "together":
        top, candidates = [int(order[0])], order[1:CANDIDATES].tolist()
        while len(top) < n_top:
            sets = [dy.sites.union(recipe.model, [matrices[j] for j in (*top, i)]) for i in candidates]
            top.append(candidates.pop(int(np.argmax(moves(sets)))))
        order = np.array([*top, *(i for i in order if i not in top)])
    ends = [
        dy.steps.advance(
            recipe, start, start.step + way.look, lambda step, b=b: b[step - start.step]
        ).parameters
        for b in (base, source)
    ]
    delta = {name: ends[1][name] - ends[0][name] for name in ends[0]}
    ones = {name: torch.ones_like(p) for name, p in delta.items()}
    sizes = np.array([[squared(tensors, site) for tensors in (ones, delta)] for site in matrices])
    wanted = sizes[order[:n_top]].sum(0)
    draws = np.random.default_rng(task.config.seed)
    rest = order[n_top:]
    tries = [draws.choice(rest, size=int(draws.integers(1, len(rest))), replace=False) for _ in range(20_000)]
    ratios = np.array([sizes[t].sum(0) / wanted for t in tries])
    best = np.argsort(np.abs(np.log(ratios)).sum(1))[:N_RANDOM]
    random_sets = [[matrices[i] for i in tries[b]] for b in best]
    return (
        [matrices[i] for i in order[:n_top]],
        random_sets,
        [(r[0], float(np.sqrt(r[1]))) for r in ratios[best]],
    )


def trained(recipe: Recipe, start: Checkpoint, task: AliasTask) -> dict[str, float]:
    """Dt3 − Df4 over the last quarter of the steps of X2, each measure's mean over five moments."""
    moments = np.linspace(0.75 * STEPS, STEPS, 5).round().astype(int) + start.step
    state, values = start, []
    for moment in moments:
        state = dy.steps.advance(recipe, state, int(moment), task.batch)
        values.append([gap(recipe, state, task, measure) for measure in MEASURES.values()])
    return dict(zip(MEASURES, np.mean(values, axis=0), strict=True))


def gap(recipe: Recipe, state: Checkpoint, task: AliasTask, measure: dy.measures.Measure) -> float:
    """Mean of a measure over the questions of Dt3 less that over Df4."""
    state.restore(recipe.model)
    recipe.model.eval()
    with torch.no_grad():
        dt3, df4 = (float(measure(recipe.model, task.evaluation[name]).mean()) for name in ("Dt3", "Df4"))
    recipe.model.train()
    return dt3 - df4


def references(task: AliasTask, run: Trajectory) -> xr.Dataset:
    """Each measure's Dt3 − Df4 with the tag's difference erased nowhere, and everywhere: [erased]."""
    recipe, start = task.recipe(), run.at(task.config.phases.starts["x2"])
    everywhere = dy.tasks.tag_blind(recipe, task, dy.sites.parameters(recipe.model))
    return _worlds(task, start, {"nowhere": recipe, "everywhere": everywhere})


def erased(task: AliasTask, run: Trajectory, way: Way) -> xr.Dataset:
    """The same, erased in the chosen matrices and in random ones; `matrices`, and how these match: [erased]."""
    recipe, start = task.recipe(), run.at(task.config.phases.starts["x2"])
    top, random_sets, ratios = chosen_and_random(recipe, start, task, way)
    sites = {"chosen": top, **{f"random {i}": chosen for i, chosen in enumerate(random_sets)}}
    worlds = {name: dy.tasks.tag_blind(recipe, task, some) for name, some in sites.items()}
    size, difference_of = np.array([(np.nan, np.nan), *ratios]).T
    return _worlds(task, start, worlds).assign(
        matrices=("erased", [", ".join(site.label for site in some) for some in sites.values()]),
        parameters=("erased", size),
        difference=("erased", difference_of),
    )


def _worlds(task: AliasTask, start: Checkpoint, worlds: Mapping[str, Recipe]) -> xr.Dataset:
    found = {name: trained(recipe, start, task) for name, recipe in worlds.items()}
    return xr.Dataset(
        {measure: ("erased", [values[measure] for values in found.values()]) for measure in MEASURES},
        {"erased": list(found)},
        {"provenance": results.provenance(step=start.step, measure=list(MEASURES))},
    )


# --- what it comes to -------------------------------------------------------------------------------------


def by_seed(found: Found, erased: str, measure: str) -> Array:
    """Dt3 − Df4 of each seed, the mean of its forks and of all worlds whose name begins so."""
    return np.array(
        [
            np.mean(
                [
                    float(fork[measure].sel(erased=name))
                    for fork in forks
                    for name in map(str, fork["erased"].values)
                    if name.startswith(erased)
                ]
            )
            for forks in found.values()
        ]
    )


def gone(plain: Found, found: Found, name: str, measure: str = PRIMARY) -> dy.statistics.Interval:
    """What is gone with the difference erased somewhere, of what goes with it erased everywhere."""
    full = by_seed(plain, "nowhere", measure)
    return dy.statistics.recovery(
        full - by_seed(found, name, measure), full - by_seed(plain, "everywhere", measure)
    )


def best(found: Mapping[Way, Found]) -> Way:
    """The way whose chosen matrices take most of D beyond what random ones take, of the seeds explored."""

    def beyond(way: Way) -> float:
        chosen, random = (by_seed(found[way], name, PRIMARY).mean() for name in GOALS)
        return float(random - chosen)

    return max(found, key=beyond)


def table(plain: Found, found: Mapping[Way, Found]) -> list[str]:
    """Lines: Dt3 − Df4 and what is gone of it, by where the tag's difference was erased."""
    rows = []

    def row(words: str, part: Found, name: str) -> None:
        cells = []
        for measure in MEASURES:
            ratio = gone(plain, part, name, measure)
            shown = "–" if np.isnan(ratio.estimate) else "{:.0%} [{:.0%}, {:.0%}]".format(*map(float, ratio))
            cells += [interval(by_seed(part, name, measure)), shown]
        rows.append([words, *cells])

    row("nowhere", plain, "nowhere")
    row("everywhere", plain, "everywhere")
    for way, part in found.items():
        row(f"the chosen {SHARE:.0%} of matrices ({way})", part, "chosen")
        row("random matrices, matched", part, "random")
    head = ["tag's difference erased in", "Dt3 − Df4, accuracy", "gone of it", "correct logit", "gone of it"]
    return markdown(head, rows)


def by_embedding(plain: Found, found: Found) -> str:
    """What goes where the token embedding is among the chosen matrices, and where it is not: forks, not seeds."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    for seed, forks in found.items():
        for before, after in zip(plain[seed], forks, strict=True):
            chosen = str(after["matrices"].sel(erased="chosen").item()).split(", ")
            gap = before[PRIMARY].sel(erased="nowhere") - after[PRIMARY].sel(erased="chosen")
            taken[EMBEDDING in chosen].append(float(gap))
    said = [
        f"{interval(values) if len(values) > 1 else '–'} ({len(values)} forks)" for values in taken.values()
    ]
    return f"Logits gone where {EMBEDDING} is among the chosen: {said[0]}; where it is not: {said[1]}."


def verdict(plain: Found, found: Found) -> str:
    """Whether both goals are reached, and by how much the chosen matrices take more than random ones."""
    reached = float(gone(plain, found, "chosen").estimate), float(gone(plain, found, "random").estimate)
    said = "reached" if reached[0] >= GOALS["chosen"] and reached[1] <= GOALS["random"] else "not reached"
    more = interval(by_seed(found, "random", PRIMARY) - by_seed(found, "chosen", PRIMARY))
    return (
        f"The goals, at least {GOALS['chosen']:.0%} of the logits' difference gone with the chosen matrices and at "
        f"most {GOALS['random']:.0%} with random ones, are {said}. The chosen take {more} logits more."
    )


def matched(found: Found) -> str:
    """Which matrices are chosen most often, and how random ones match them."""
    forks = [fork for forks in found.values() for fork in forks]
    chosen = [
        name for fork in forks for name in str(fork["matrices"].sel(erased="chosen").item()).split(", ")
    ]
    often = Counter(chosen).most_common(6)
    spans = [
        f"{min(map(float, values)):.2f}–{max(map(float, values)):.2f}"
        for name in ("parameters", "difference")
        for values in [np.concatenate([fork[name].dropna("erased").values for fork in forks])]
    ]
    return (
        f"Chosen most often: {', '.join(f'{label} ({n})' for label, n in often)}, of {len(forks)} forks. Random "
        f"sets have {spans[0]} times the chosen parameters and {spans[1]} times their ‖Δ‖."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Erase, train again, say which way does best, and with --confirm how it does on the other seeds."""
    given = command_line(__doc__, "loop", arguments)

    def asked(seeds: Sequence[int], ways: Sequence[Way]) -> tuple[Found, dict[Way, Found]]:
        return of_seeds(references, given, seeds, "references"), {
            way: of_seeds(partial(erased, way=way), given, seeds, f"{way.choose}-{way.look}") for way in ways
        }

    plain, found = asked(EXPLORED[: given.explore], WAYS)
    way = best(found)
    best_of = f"Of these ways the best: {way}. {matched(found[way])}"
    text = [f"Explored, {len(plain)} seeds:", "", *table(plain, found), "", best_of, ""]
    there: Found = {}
    if given.confirm:
        there, confirmed = asked(CONFIRMED, [way])
        for words, part, of in (("Confirmed", there, confirmed), ("Afterwards", *asked(EXPLORED, [LATER]))):
            (one,) = of.values()
            said = f"{verdict(part, one)} {by_embedding(part, one)} {matched(one)}"
            text += [f"{words}, {len(part)} seeds:", "", *table(part, of), "", said, ""]
    text += [
        f"X2's first {STEPS} steps again; means over the last quarter; gone = ratio of means to what is gone "
        f"everywhere, Fieller's 95 % interval over seeds; {seeds_said(plain, there)}. {stamp(__file__)}",
    ]
    conclude(given, "loop", "\n".join(text))


if __name__ == "__main__":
    main()
