"""What every verb checks of its arguments at its door, and how errors name a contrast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from checkpoints import Checkpoint, CheckpointPair, Trajectory
from dynamics import measures
from dynamics.measures import LogitMeasure, Measure
from dynamics.models.functional import refuse_bridge
from dynamics.recipe import Contrast, Recipe
from dynamics.results.labels import check_coordinates, example_columns
from dynamics.sites import Site
from dynamics.sites.site import check_labels


def check_arguments(
    verb: str,
    recipe: Any,
    checkpoint: Any,
    contrasts: Any,
    sites: Any,
    measure: Measure | Mapping[str, Measure],
) -> None:
    """Raise an error in the toolkit's words where an argument of a verb is of another kind than it takes.

    Raises:
        TypeError: of another kind; says what was found, what was expected, what to do.
        ValueError: no contrasts, sites or measures, contrasts that share a label, or coordinates that clash.
        SiteError: sites that share a label or cover nothing.
    """
    check_recipe(verb, recipe, checkpoint)
    check_all(verb, "contrasts", contrasts, Contrast)
    check_all(verb, "sites", sites, Site)
    by_name = measures.named(measure)
    if not by_name:
        raise ValueError(f"{verb} was given no measures; it needs at least one.")
    for name, function in by_name.items():
        if not callable(function):
            raise TypeError(
                f"{verb} was given {_shown(function)} as measure {name!r}; expected a function (model, batch) -> "
                "tensor [rows] or scalar, one of dynamics.measures, or a dict of such."
            )
    if len(set(example_columns(contrasts)["example"])) < len(contrasts):
        raise ValueError("contrasts share a label in coords['example']; give each its own.")
    check_labels(sites)
    check_coordinates(contrasts, sites)


def check_step_arguments(
    verb: str,
    recipe: Any,
    checkpoint: Any,
    contrasts: Any,
    sites: Any,
    measure: Measure | Mapping[str, Measure],
) -> None:
    """The same of a verb that takes a training step: each contrast has a probe that the measures can read."""
    check_arguments(verb, recipe, checkpoint, contrasts, sites, measure)
    refuse_bridge(recipe.model)
    for i, contrast in enumerate(contrasts):
        check_probe(verb, named(contrasts, i), contrast.probe, measure)


def check_pair_arguments(
    verb: str,
    recipe: Any,
    pair: Any,
    contrasts: Any,
    sites: Any,
    measure: Measure | Mapping[str, Measure],
) -> None:
    """The same of a verb that exchanges between two checkpoints: the measures can read each contrast's batch."""
    check_recipe(verb, recipe, None)
    if not isinstance(pair, CheckpointPair):
        raise TypeError(
            f"{verb} takes a pair of checkpoints second and was given {_shown(pair)}; give "
            "checkpoints.CheckpointPair(base, source), such as CheckpointPair(run.at(0), run.at(100))."
        )
    check_arguments(verb, recipe, None, contrasts, sites, measure)
    refuse_bridge(recipe.model)
    for i, contrast in enumerate(contrasts):
        check_probe(verb, named(contrasts, i), probe_of(contrast), measure)


def probe_of(contrast: Contrast) -> Any:
    """What two checkpoints are measured on: a contrast's probe, or its base batch where it has none."""
    return contrast.base if contrast.probe is None else contrast.probe


def check_sources(verb: str, contrasts: Sequence[Contrast]) -> None:
    """Raise a ValueError where a contrast has no source batch, which a verb of one checkpoint needs."""
    for i, contrast in enumerate(contrasts):
        if contrast.source is None:
            raise ValueError(
                f"{verb} exchanges between two batches, and {named(contrasts, i)} has no source: give "
                "Contrast(base, source). A base alone serves where two checkpoints are compared."
            )


def check_probe(verb: str, name: str, probe: Any, measure: Measure | Mapping[str, Measure]) -> None:
    """Raise an error where a measure of the logits cannot read a contrast's probe; functions may do without."""
    for measure_name, function in measures.named(measure).items():
        if not isinstance(function, LogitMeasure) or hasattr(probe, "target_pos"):
            continue
        if probe is None:
            raise ValueError(
                f"{verb} measures what a step did on each contrast's probe, and {name} has none: give "
                "Contrast(base, source, probe=batch)."
            )
        raise TypeError(
            f"measure {measure_name!r} reads the logits at a Batch's target_pos, and the probe of {name} is "
            f"{_shown(probe)}. Give a dynamics.Batch, or a function (model, batch) as the measure."
        )


def check_recipe(verb: str, recipe: Any, checkpoint: Any) -> None:
    """Raise a TypeError unless a verb's first two arguments are a Recipe and a Checkpoint or None."""
    if not isinstance(recipe, Recipe):
        give = (
            "dynamics.Recipe(model, loss, optimizer)"
            if isinstance(recipe, nn.Module)
            else "a dynamics.Recipe"
        )
        raise TypeError(f"{verb} takes a recipe first and was given {_shown(recipe)}; give {give}.")
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return
    if isinstance(checkpoint, Trajectory):
        give = f"one of its checkpoints, such as run.at({checkpoint.steps[0] if checkpoint.steps else 0})"
    elif isinstance(checkpoint, CheckpointPair):
        give = (
            "its base or its source; patch_parameters, attribute_parameters and patch_activations take pairs"
        )
    elif isinstance(checkpoint, int):
        give = f"run.at({checkpoint}), or dynamics.steps.reach(recipe, run, {checkpoint}, batch_of)"
    elif isinstance(checkpoint, nn.Module | Optimizer):
        give = "Checkpoint.capture(model, optimizer, step=n), or None for the recipe's model as it stands"
    else:
        give = "a Checkpoint, or None for the recipe's model as it stands"
    raise TypeError(f"{verb} takes a checkpoint second and was given {_shown(checkpoint)}; give {give}.")


def check_all(verb: str, what: str, given: Any, kind: type) -> None:
    """Raise an error unless a list of one kind was given, with at least one item."""
    if isinstance(given, kind):
        raise TypeError(
            f"{verb} takes a list of {what} and was given one {kind.__name__}; give [it] instead."
        )
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{verb} takes a list of {what} and was given {_shown(given)}.")
    if not given:
        raise ValueError(f"{verb} was given no {what}; it needs at least one.")
    for i, item in enumerate(given):
        if not isinstance(item, kind):
            raise TypeError(
                f"{verb} takes a list of {what}, and number {i} of those given is {_shown(item)}; expected a "
                f"{kind.__name__}."
            )


def named(contrasts: Sequence[Contrast], i: int) -> str:
    """How errors name a contrast: by its label, or its number."""
    return str(contrasts[i].coords.get("example", f"contrast {i}"))


@contextmanager
def naming(contrast: str) -> Iterator[None]:
    """Inside, an error is raised as it is, with a note of the contrast it happened in."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This happened in {contrast}.")
        raise


def _shown(value: Any) -> str:
    """What was given, in a few words."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"{'an' if type(value).__name__[:1] in 'AEIOUaeiou' else 'a'} {type(value).__name__}"
