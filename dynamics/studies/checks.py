"""The ten checks of a site: does reliable data change behaviour there?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from checkpoints import Checkpoint, Trajectory
from dynamics import measures, results, sites, statistics, steps, tasks
from dynamics.batch import Batch
from dynamics.comparison import under_noise
from dynamics.config import ConfigError, StudyConfig, read, task_name
from dynamics.config.checks import did_you_mean
from dynamics.measures import Measure
from dynamics.patching import both_directions, patch_gradients, patch_updates, patch_window
from dynamics.recipe import Contrast, Recipe
from dynamics.sites import LEVELS, Site, SiteError
from dynamics.tasks import AliasTask, Task
from dynamics.trees import squared_norm

Verdict = Literal["holds", "fails", "open", "-"]
"""Open: the interval includes zero, or the check cannot be made. "-": for the reader to weigh."""
Units = npt.NDArray[np.float64]

N_PLACEBOS = 20
N_NOISE = 3


@dataclass(frozen=True)
class Check:
    """One of the ten checks: what was found, and what it says."""

    name: str
    figure: str
    verdict: Verdict


def as_dataset(checks: Sequence[Check], site: str, at: str) -> xr.Dataset:
    """Checks as a Dataset [check]: `verdict` and `figure`; which site was asked, and at what, as attributes.

    Args:
        checks: from `ten_checks`.
        site: its label.
        at: step, optimizer state and unit, in words.
    """
    return xr.Dataset(
        {
            "verdict": ("check", [check.verdict for check in checks]),
            "figure": ("check", [check.figure for check in checks]),
        },
        {"check": [check.name for check in checks]},
        {"site": site, "at": at, "provenance": results.provenance(verb="ten_checks", site=site, at=at)},
    )


@dataclass(frozen=True)
class _Run:
    """One run at one step, and what its checks share."""

    trajectory: Trajectory
    label: str
    x2_step: int
    optimizer: str
    impulse: int

    @cached_property
    def task(self) -> Task:
        return tasks.load(self.trajectory.config)

    @cached_property
    def aliases(self) -> AliasTask:
        """The task of a run of aliases, which some checks are about."""
        return tasks.aliases.load(self.trajectory.config)

    @cached_property
    def recipe(self) -> Recipe:
        return self.task.recipe()

    @cached_property
    def stored(self) -> Checkpoint:
        *_, first, _ = self.task.config.phases.starts.values()
        step = first + self.x2_step
        return steps.reach(self.recipe, self.trajectory, step, self.task.batch)

    @property
    def state(self) -> Checkpoint:
        return self.stored.with_fresh_optimizer() if self.optimizer == "fresh" else self.stored

    @cached_property
    def site(self) -> Site:
        known = {s.label: s for level in LEVELS.values() for s in level(self.recipe.model)}
        if self.label not in known:
            meant = did_you_mean(self.label, known)
            raise SiteError(f"no site {self.label!r}; there are {', '.join(known)}.{meant}")
        return known[self.label]

    def patched(
        self,
        contrasts: Sequence[Contrast] | None = None,
        measure: Measure = measures.correct_logit,
        recipe: Recipe | None = None,
    ) -> xr.Dataset:
        """`patch_gradients` at the site, squeezed to one site."""
        chosen = self.task.contrasts() if contrasts is None else contrasts
        return patch_gradients(recipe or self.recipe, self.state, chosen, [self.site], measure).isel(site=0)


def ten_checks(
    trajectories: Sequence[Trajectory],
    site: str,
    x2_step: int = 10,
    optimizer: str = "fresh",
    impulse: int = 30,
) -> Iterator[Check]:
    """Ten checks of one site, one after another as they are done.

    Of a run of the small languages those that are about aliases (their sets, tags, definitions) are not made, and
    say so.

    Args:
        trajectories: runs of one task. Of one run the aliases (the contrasts of a language) are the units and the
            claim is about that run; of several the runs are, each the mean over its aliases.
        site: label of a site of any level, such as "attn 0", "L0H2" or "W_V L0H1".
        x2_step: which step within the last phase (X2) is replayed.
        optimizer: "fresh" or "stored".
        impulse: batches trained on after the definition in the impulse response.

    Raises:
        SiteError: there is no such site; the message lists all.
        ConfigError: another optimizer state, a step outside X2, no steps after the definition, runs of several
            tasks, or of none.
    """
    if optimizer not in ("fresh", "stored"):
        raise ConfigError(f"found optimizer={optimizer!r}; expected fresh or stored.")
    configs = [read(trajectory.config) for trajectory in trajectories]
    if len({type(config) for config in configs}) > 1:
        found = sorted({str(task_name(trajectory.config)) for trajectory in trajectories})
        raise ConfigError(f"found runs of the tasks {', '.join(found)}; expected runs of one task.")
    for config in configs:
        *_, (phase, trained) = config.phases.by_name.items()
        if x2_step < 0 or impulse < 1 or x2_step + impulse >= trained.steps:
            raise ConfigError(
                f"found x2_step={x2_step} and impulse={impulse}; expected a step of {phase.capitalize()} and at "
                f"least one after it, together below its {trained.steps} steps."
            )
    runs = [_Run(trajectory, site, x2_step, optimizer, impulse) for trajectory in trajectories]
    about_aliases = isinstance(configs[0], StudyConfig)
    for check in (
        _directions,
        _own_questions,
        _measures,
        _matched_norm,
        _sets,
        _contents,
        _placebo,
        _impulse,
        _tags,
        _unseen_rows,
    ):
        if about_aliases:
            yield check(runs)
        elif check in _ABOUT_ALIASES:
            name = task_name(trajectories[0].config)
            yield Check(
                _ABOUT_ALIASES[check], f"not made: it needs aliases, the run is of the task {name!r}", "-"
            )
        else:
            made = check(runs)
            name = made.name.replace("alias's", "contrast's").replace("definitions", "batches")
            yield replace(made, name=name)


def _gathered(runs: Sequence[_Run], values: Callable[[_Run], Units]) -> Units:
    """One value per alias of a single run, or one per run."""
    found = [values(run) for run in runs]
    return found[0] if len(found) == 1 else np.array([part.mean() for part in found])


def _text(values: Units) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*map(float, statistics.mean_interval(values)))


def _signs(*groups: Units) -> Verdict:
    """Holds where every mean's interval lies on one side of zero, the same for all; fails where two differ."""
    bounds = [statistics.mean_interval(values) for values in groups]
    if any(not (b.low > 0 or b.high < 0) for b in bounds):
        return "open"
    return "holds" if len({bool(b.low > 0) for b in bounds}) == 1 else "fails"


def _directions(runs: Sequence[_Run]) -> Check:
    def effects(run: _Run) -> xr.Dataset:
        contrasts = run.task.contrasts()
        return both_directions(
            patch_gradients, run.recipe, run.state, contrasts, [run.site], measures.correct_logit
        ).isel(site=0)

    found = {id(run): effects(run)["effect"] for run in runs}
    sufficient = _gathered(runs, lambda run: found[id(run)].sel(direction="sufficiency").values)
    necessary = -_gathered(runs, lambda run: found[id(run)].sel(direction="necessity").values)
    figure = f"sufficiency {_text(sufficient)}, necessity {_text(necessary)} logit"
    return Check("sufficiency and necessity agree", figure, _signs(sufficient, necessary))


def _own_questions(runs: Sequence[_Run]) -> Check:
    def both(run: _Run) -> tuple[Units, Units]:
        contrasts = run.task.contrasts()
        others = [replace(c, probe=contrasts[i - 1].probe) for i, c in enumerate(contrasts)]
        return run.patched(contrasts)["effect"].values, run.patched(others)["effect"].values

    found = {id(run): both(run) for run in runs}
    own, other = (_gathered(runs, lambda run, i=i: found[id(run)][i]) for i in (0, 1))  # type: ignore[misc]
    values = np.sign(own.mean()) * (own - other)
    return Check(
        "moves the alias's own questions more than another's", f"by {_text(values)} logit", _above(values)
    )


def _above(values: Units) -> Verdict:
    """Holds where the mean's interval lies above zero, fails where it lies below."""
    _, low, high = statistics.mean_interval(values)
    return "holds" if low > 0 else "fails" if high < 0 else "open"


def _measures(runs: Sequence[_Run]) -> Check:
    chosen = (measures.correct_logit, measures.centred_logit, measures.correct_log_prob)
    values = [_gathered(runs, lambda run, m=m: run.patched(measure=m)["effect"].values) for m in chosen]  # type: ignore[misc]
    figure = ", ".join(f"{m.name} {_text(v)}" for m, v in zip(chosen, values, strict=True))
    return Check("holds in other measures than the raw logit", figure, _signs(*values))


def _matched_norm(runs: Sequence[_Run]) -> Check:
    """The source batch's loss is scaled so that ‖g_R‖ = ‖g_U‖."""

    def effect(run: _Run) -> Units:
        plain = run.recipe.require_loss()
        weighted = replace(run.recipe, loss=lambda model, pair: pair[1] * plain(model, pair[0]))
        contrasts = []
        for contrast in run.task.contrasts():
            base, source = (
                sum(map(squared_norm, steps.gradient(run.recipe, run.state, b).gradients.values())) ** 0.5
                for b in (contrast.base, contrast.source)
            )
            contrasts.append(
                replace(contrast, base=(contrast.base, 1.0), source=(contrast.source, base / source))
            )
        return run.patched(contrasts, recipe=weighted)["effect"].values

    plain = _gathered(runs, lambda run: run.patched()["effect"].values)
    values = _gathered(runs, effect)
    return Check(
        "survives matching ‖g‖ of the two definitions", f"{_text(values)} logit", _signs(plain, values)
    )


def _sets(runs: Sequence[_Run]) -> Check:
    values = [
        _gathered(runs, lambda run, name=name: run.patched(run.aliases.contrasts((name,)))["effect"].values)  # type: ignore[misc]
        for name in ("Dt3", "Df4")
    ]
    figure = f"Dt3 {_text(values[0])}, Df4 {_text(values[1])} logit"
    return Check(_ABOUT_ALIASES[_sets], figure, _signs(*values))


def _false_contrasts(task: AliasTask) -> list[Contrast]:
    """The contrasts with the value of another alias of the same set in both definitions."""
    found = []
    for name in ("Dt3", "Df4"):
        members = task.sets[name]
        for place, contrast in enumerate(task.contrasts((name,))):
            other = members[place - 1]
            base, source = (
                task.definition(members[place], tag, value=other) for tag in ("unreliable", "reliable")
            )
            found.append(replace(contrast, base=base, source=source))
    return found


def _contents(runs: Sequence[_Run]) -> Check:
    def cells(run: _Run) -> dict[str, Units]:
        true, false = run.patched(), run.patched(_false_contrasts(run.aliases))
        return {
            "true": true["effect"].values,
            "false": false["effect"].values,
            **{
                f"{tag} {content}": (part[side] - part["untouched"]).values
                for content, part in (("true", true), ("false", false))
                for tag, side in (("unreliable", "base"), ("reliable", "source"))
            },
        }

    found = {id(run): cells(run) for run in runs}
    values = {name: _gathered(runs, lambda run, n=name: found[id(run)][n]) for name in found[id(runs[0])]}  # type: ignore[misc]
    sign = np.sign(values["true"].mean())
    steps_of = ", ".join(f"{n} {values[n].mean():+.2f}" for n in values if " " in n)
    figure = f"true {_text(values['true'])}, false {_text(values['false'])}; whole steps: {steps_of}"
    return Check(_ABOUT_ALIASES[_contents], figure, _above(sign * (values["true"] - values["false"])))


def _placebo(runs: Sequence[_Run]) -> Check:
    own, exceeded = [], []
    for run in runs:
        contrasts = run.task.contrasts()
        difference = steps.update_difference(run.recipe, run.state, contrasts)
        placebos = sites.placebo(run.site, difference, N_PLACEBOS)
        if not placebos:
            continue
        found = patch_updates(run.recipe, run.state, contrasts, [run.site, *placebos], measures.correct_logit)
        sizes = np.abs(found["effect"].mean("example").values)
        own.append(sizes[0])
        exceeded.append(np.quantile(sizes[1:], 0.95, method="weibull"))
    name = "exceeds random parameters of the same ‖Δ‖ (95th percentile)"
    if not own:
        return Check(name, "no placebo: the site holds over half of ‖Δ‖², or none", "open")
    figure = f"|effect| {np.mean(own):.3f} against {np.mean(exceeded):.3f} logit, {N_PLACEBOS} placebos"
    above = np.array(own) > np.array(exceeded)
    return Check(name, figure, "holds" if above.mean() > 0.5 else "fails")


def _impulse(runs: Sequence[_Run]) -> Check:
    """Beside its noise floor: how far the mean response lies from where a perturbed start takes it, typically."""

    def responses(run: _Run, start: Checkpoint) -> xr.Dataset:
        windows = run.aliases.impulses(start.step, run.impulse + 1)
        return patch_window(
            run.recipe, start, windows, [run.site], measures.correct_logit, (1, run.impulse + 1)
        ).isel(site=0)

    found = {id(run): responses(run, run.stored)["effect"] for run in runs}
    first, last = (_gathered(runs, lambda run, i=i: found[id(run)].isel(step=i).values) for i in (0, -1))  # type: ignore[misc]
    single = _gathered(runs, lambda run: run.patched()["effect"].values)
    noisy = [
        under_noise(partial(responses, run), run.stored, N_NOISE)["effect"].isel(step=-1) for run in runs
    ]
    moved = [
        (effects.mean("example") - found[id(run)].isel(step=-1).mean("example")).values
        for run, effects in zip(runs, noisy, strict=True)
    ]
    figure = (
        f"in the real batch, stored state: {_text(first)} at once, {_text(last)} {runs[0].impulse} steps later; "
        f"noise floor of a run's mean there ±{np.sqrt(np.mean(np.square(moved))):.3f}"
    )
    return Check(_ABOUT_ALIASES[_impulse], figure, _signs(single, last))


def _tags(runs: Sequence[_Run]) -> Check:
    lines = []
    for tag in ("reliable", "unreliable"):
        counts, norms, losses = [], [], []
        for run in runs:
            token = getattr(run.aliases, tag)
            counts.append(int((run.task.rows("x1").tokens[:, 0] == token).sum()))
            norms.append(float(run.stored.parameters["embed.W_E"][token].norm()))
            losses.append(np.mean([_loss(run, getattr(c, _SIDE[tag])) for c in run.task.contrasts()]))
        lines.append(
            f"{tag}: {np.mean(counts):.0f} rows in X1, ‖embedding‖ {np.mean(norms):.2f}, "
            f"definition loss {np.mean(losses):.2f} nat"
        )
    return Check(_ABOUT_ALIASES[_tags], "; ".join(lines), "-")


_SIDE = {"reliable": "source", "unreliable": "base"}


def _loss(run: _Run, batch: Batch) -> float:
    return float(steps.gradient(run.recipe, run.state, batch).loss)


def _unseen_rows(runs: Sequence[_Run]) -> Check:
    """Aliases of Dt3 and Df4 are in no row before X2: their embeddings' second moments are near zero."""
    name = _ABOUT_ALIASES[_unseen_rows]
    if not any("embed.W_E" in run.site.covers for run in runs):
        return Check(name, "the site covers none", "-")
    carried, moments = [], []
    for run in runs:
        aliases = torch.tensor([run.aliases.alias(i) for n in ("Dt3", "Df4") for i in run.aliases.sets[n]])
        rows = Site("alias rows", {"embed.W_E": (aliases,)})
        found = patch_gradients(
            run.recipe, run.state, run.task.contrasts(), [run.site, rows], measures.correct_logit
        )
        own, unseen = found["effect"].mean("example").values
        carried.append(unseen / own)
        second = run.stored.optimizer.state["embed.W_E"]["exp_avg_sq"] if run.stored.optimizer else None
        if second is not None:
            others = torch.ones(len(second), dtype=torch.bool)
            others[aliases] = False
            moments.append(float(second[aliases].mean() / second[others].mean()))
    figure = f"carry {np.mean(carried):.0%} of the site's effect"
    if moments:
        figure += f"; their second moment is {np.mean(moments):.1e} times the other rows'"
    return Check(name, figure, "-")


_ABOUT_ALIASES: dict[Callable[[Sequence[_Run]], Check], str] = {
    _sets: "holds in Dt3 and in Df4",
    _contents: "the site's effect is larger for true content than for false",
    _impulse: "the impulse response agrees with the single step",
    _tags: "the two tags beside each other",
    _unseen_rows: "rows never trained before X2 (alias embeddings)",
}
"""The checks that need sets, tags or definitions of aliases, and what they are called."""
