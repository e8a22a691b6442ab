"""Weights and updates of two checkpoints, site by site."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from checkpoints import Checkpoint
from dynamics import results
from dynamics.comparison.tables import Products, cosine, differences, labelled
from dynamics.recipe import Recipe
from dynamics.results.labels import site_columns
from dynamics.sites import Site, check, check_whole
from dynamics.steps.states import starting_point


def compare_weights(
    before: Checkpoint, after: Checkpoint, recipe: Recipe, sites: Sequence[Site]
) -> xr.Dataset:
    """How far each site's parameters lie from what they were.

    Args:
        before, after: two checkpoints of the recipe's model.
        recipe: its model says which parameters there are; it is not changed.
        sites: parts of the parameters (buffers do not count), length n_sites; overlapping as they like.

    Returns:
        [site]: `distance` ‖θ_after − θ_before‖, `norm` ‖θ_before‖, `relative` their ratio, and `cosine` of
        θ_before and θ_after. NaN where a norm is zero.

    Raises:
        SiteError: a site covers what the model does not have, or positions.
        RecipeError: a checkpoint is of another model.
    """
    first, second = (_parameters(c, recipe, sites, "compare_weights") for c in (before, after))
    products = Products(sites, first.parameters)
    change = differences(second.parameters, first.parameters)
    squares = products(first.parameters, first.parameters)
    distance, norm = np.sqrt(products(change, change)), np.sqrt(squares)
    other = products(second.parameters, second.parameters)
    variables = {
        "distance": (distance, "‖θ_after − θ_before‖", "1"),
        "norm": (norm, "‖θ_before‖", "1"),
        "relative": (
            np.divide(distance, norm, out=np.full(norm.shape, np.nan), where=norm > 0),
            "‖θ_after − θ_before‖ / ‖θ_before‖",
            "1",
        ),
        "cosine": (
            cosine(products(first.parameters, second.parameters), squares, other),
            "cosine of θ_before and θ_after",
            "1",
        ),
    }
    facts = results.provenance(quantity="weights", before=before.step, after=after.step)
    return labelled("site", site_columns(sites), variables, facts)


def compare_updates(
    start: Checkpoint, middle: Checkpoint, end: Checkpoint, recipe: Recipe, sites: Sequence[Site]
) -> xr.Dataset:
    """Whether training went on in the direction it came from: the update start → middle against middle → end.

    Two runs that began alike are compared by their updates in the same way: give the one's end as `start` and
    the common beginning as `middle`, and the cosine is minus that of the two runs' updates.

    Args:
        start, middle, end: three checkpoints of the recipe's model.
        recipe, sites: as `compare_weights`.

    Returns:
        [site]: `first` and `second`, the norms of the two updates, and their `cosine` (NaN where one is zero).

    Raises:
        As `compare_weights`.
    """
    a, b, c = (
        _parameters(each, recipe, sites, "compare_updates").parameters for each in (start, middle, end)
    )
    products = Products(sites, a)
    first, second = differences(b, a), differences(c, b)
    squares = products(first, first), products(second, second)
    variables = {
        "first": (np.sqrt(squares[0]), "‖θ_middle − θ_start‖", "1"),
        "second": (np.sqrt(squares[1]), "‖θ_end − θ_middle‖", "1"),
        "cosine": (cosine(products(first, second), *squares), "cosine of the two updates", "1"),
    }
    facts = results.provenance(quantity="updates", start=start.step, middle=middle.step, end=end.step)
    return labelled("site", site_columns(sites), variables, facts)


def _parameters(checkpoint: Checkpoint, recipe: Recipe, sites: Sequence[Site], what: str) -> Checkpoint:
    """The checkpoint on the model's device, sites checked."""
    check(sites, recipe.model)
    check_whole(sites, what, "leave them out, as sites.heads(model) does")
    return starting_point(recipe, checkpoint)
