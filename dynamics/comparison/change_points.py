"""When did it happen: change points of curves, their intervals over seeds, and the order of events.

Fits see the order of the points and not their distances, except `bend`. Give the points evenly on the scale that is
meant: log-spaced steps where early training matters as much as late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import ruptures
import xarray as xr

from dynamics.statistics import mean_interval

Array = npt.NDArray[np.float64]
Fit = Callable[[Array, Array], "Changes"]


class Changes(NamedTuple):
    """Where a curve changes.

    Attributes:
        at: x of each change, rising: [n_changes]; empty where the curve is better described without any.
        fitted: the fit at each point: [n_points].
        gain: by how much its BIC is below that of a curve without a change; 0 where there is none.
    """

    at: Array
    fitted: Array
    gain: float


def level_changes(x: npt.ArrayLike, y: npt.ArrayLike, most: int = 1) -> Changes:
    """A piecewise-constant fit with as many changes as BIC asks for, by exact segmentation.

    Every division into segments of two points or more is considered (`ruptures.KernelCPD`). A change is placed at
    the first point of its new level. With k changes BIC = n ln(RSS / n) + (2k + 1) ln n: a level for each segment
    and a place for each change. Neighbouring points of a training curve are not independent, so a slow drift is
    called a change too: the gain says how much it explains, not how sure it is.

    Args:
        x, y: [n_points], x rising; points whose y is NaN are left out.
        most: at most so many changes.

    Source: Bellman & Dreyfus 1962; Yao 1988 for the criterion; ruptures (Truong et al. 2020).
    """
    x, y = _points(x, y)
    n = y.size
    search = ruptures.KernelCPD(kernel="linear", min_size=2).fit(y)
    divisions = [[n], *(search.predict(n_bkps=k) for k in range(1, most + 1) if 2 * (k + 1) <= n)]
    fits = [_levels(y, ends) for ends in divisions]
    scores = [_bic(((y - fit) ** 2).sum(), y, 2 * k + 1) for k, fit in enumerate(fits)]
    chosen = int(np.argmin(scores))
    return Changes(x[divisions[chosen][:-1]], fits[chosen], float(scores[0] - scores[chosen]))


def bend(x: npt.ArrayLike, y: npt.ArrayLike) -> Changes:
    """A continuous piecewise-linear fit with at most one bend: the onset of a rise or a fall.

        y = a + b x + c max(0, x − t)

    The bend t is the point (none of the first two or last two) with the least RSS; it counts where BIC, with two
    parameters more than a line's, is below the line's. Distances along x count: give log steps where they are
    meant.

    Args:
        x, y: as `level_changes`.

    Source: Hudson 1966.
    """
    x, y = _points(x, y)
    line = _least_squares(np.stack([np.ones_like(x), x], 1), y)
    fits = [(_least_squares(np.stack([np.ones_like(x), x, np.maximum(0, x - t)], 1), y), t) for t in x[2:-2]]
    if not fits:
        return Changes(np.array([]), line, 0.0)
    bent, t = min(fits, key=lambda fit: float(((y - fit[0]) ** 2).sum()))
    gain = _bic(((y - line) ** 2).sum(), y, 2) - _bic(((y - bent) ** 2).sum(), y, 4)
    if gain <= 0:
        return Changes(np.array([]), line, 0.0)
    return Changes(np.array([t]), bent, float(gain))


def when(curves: xr.DataArray, fit: Fit = level_changes, confidence: float = 0.95) -> xr.Dataset:
    """The first change of every curve along `step`, and where there are seeds an interval over them.

    Args:
        curves: [.., step], and `seed` where there are several runs.
        fit: `level_changes`, `bend`, or any function (x, y) -> Changes; settings by `functools.partial`.
        confidence: of the interval.

    Returns:
        [.., (seed)]: `at`, the step of the first change (NaN where there is none); `change`, the mean after it less
        the mean before; `gain`. With a dim `seed` also, without it: `mean`, `low`, `high` (t interval of `at`) and
        `n`, the seeds that have a change.

    Raises:
        ValueError: there is no dim `step`.
    """
    if "step" not in curves.dims:
        raise ValueError(f"the curves have dims {curves.dims}; expected 'step' among them")
    x = curves["step"].values.astype(np.float64)

    def first(y: Array) -> tuple[float, float, float]:
        found = fit(x, y)
        if not found.at.size:
            return np.nan, np.nan, 0.0
        later = x >= found.at[0]
        return float(found.at[0]), float(np.nanmean(y[later]) - np.nanmean(y[~later])), found.gain

    parts = xr.apply_ufunc(
        first, curves, input_core_dims=[["step"]], output_core_dims=[[], [], []], vectorize=True
    )
    dataset = xr.Dataset(dict(zip(("at", "change", "gain"), parts, strict=True)))
    dataset["at"].attrs = {"long_name": "first change", "units": "step"}
    dataset["change"].attrs = {
        "long_name": "mean after − mean before",
        "units": curves.attrs.get("units", ""),
    }
    dataset["gain"].attrs = {"long_name": "BIC without a change − BIC", "units": "1"}
    if "seed" not in curves.dims:
        return dataset
    bounds = xr.apply_ufunc(
        mean_interval,
        dataset["at"],
        input_core_dims=[["seed"]],
        output_core_dims=[[]] * 3,
        kwargs={"confidence": confidence},
    )
    found = dict(zip(("mean", "low", "high"), (b.assign_attrs(units="step") for b in bounds), strict=True))
    return dataset.assign(**found, n=dataset["at"].notnull().sum("seed")).assign_attrs(confidence=confidence)


def order_of_events(events: Mapping[str, npt.ArrayLike], confidence: float = 0.95) -> xr.Dataset:
    """Which event came first, by how much, over seeds.

    Args:
        events: name -> the step in every run, NaN where it did not happen: each [n_seeds], the same runs in order.
        confidence: of the interval.

    Returns:
        [example, other] over the events: `later`, the mean of other − example over runs that have both, with `low`
        and `high` (t interval); `n`, how many have both. Positive where `example` comes before `other`.
    """
    names = list(events)
    values = {name: np.asarray(events[name], float) for name in names}
    shape = (len(names), len(names))
    found = {key: np.full(shape, np.nan) for key in ("later", "low", "high")}
    n = np.zeros(shape, dtype=np.int64)
    for (i, first), (j, second) in combinations(enumerate(names), 2):
        gap = values[second] - values[first]
        mean, low, high = map(float, mean_interval(gap, confidence=confidence))
        n[i, j] = n[j, i] = np.count_nonzero(~np.isnan(gap))
        found["later"][i, j], found["low"][i, j], found["high"][i, j] = mean, low, high
        found["later"][j, i], found["low"][j, i], found["high"][j, i] = -mean, -high, -low
    dims = ("example", "other")
    variables = {key: (dims, array, {"units": "step"}) for key, array in found.items()}
    return xr.Dataset(
        {**variables, "n": (dims, n)}, {"example": names, "other": names}, {"confidence": confidence}
    )


def _points(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Array, Array]:
    """The points that have a y.

    Raises:
        ValueError: lengths differ, or x does not rise.
    """
    across, up = np.asarray(x, float), np.asarray(y, float)
    if across.shape != up.shape or across.ndim != 1 or (np.diff(across) <= 0).any():
        raise ValueError(
            f"found x of shape {across.shape} and y of {up.shape}; expected one y for each rising x"
        )
    present = ~np.isnan(up)
    if not present.any():
        raise ValueError("no point of the curve has a number")
    return across[present], up[present]


def _levels(y: Array, ends: Sequence[int]) -> Array:
    """The mean of every segment at each of its points."""
    return np.concatenate([np.full(b - a, y[a:b].mean()) for a, b in pairwise([0, *ends])])


def _least_squares(columns: Array, y: Array) -> Array:
    """Fitted values of a linear model."""
    fitted: Array = columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    return fitted


def _bic(rss: float, y: Array, n_parameters: int) -> float:
    """n ln(RSS / n) + p ln n; an RSS of less than a few roundings of each point counts as that."""
    n = y.size
    rounding = n * (100 * np.finfo(float).eps * float(np.abs(y).max())) ** 2
    return n * float(
        np.log(max(float(rss), rounding, float(np.finfo(float).tiny)) / n)
    ) + n_parameters * float(np.log(n))
