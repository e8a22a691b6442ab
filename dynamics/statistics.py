"""Statistics of patched steps: intervals, sign-flip tests, false discovery rates and recovery.

Numerics on arrays first, labelled datasets after them. NaN units are left out everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats
import xarray as xr

from dynamics import results
from dynamics.results.text_tables import Cell, aligned, interval, number
from dynamics.site_coordinates import NESTED, PLACEBO

Array = npt.NDArray[np.float64]

_RESAMPLES = 9999
_SEED = 20240531
_BATCH = 256  # resamples drawn at once
_BAR = 10  # width of a bar in a table
_WIDTH = 100  # of a table with bars
_COLUMNS = 512  # tests made at once: 256 x 30 units x 512 tests of 8 bytes are 31 MB


class Interval(NamedTuple):
    """An estimate and its two-sided confidence bounds, each of the same shape."""

    estimate: Array
    low: Array
    high: Array


def mean_interval(values: npt.ArrayLike, axis: int = -1, confidence: float = 0.95) -> Interval:
    """The mean over the units along `axis`, with Student's t interval.

    Args:
        values: one per unit along `axis`; any shape.
        axis: the units, independent of each other.
        confidence: of the two-sided interval.

    Returns:
        In the values' units, without `axis`. With one unit the bounds are NaN, with none all three.

    Source: mean ± t_{n−1} s/√n (Student 1908).
    """
    columns, shape = _columns(values, axis)
    mean, variance, n = _moments(columns)
    half = _quantile(n, confidence) * np.sqrt(variance / np.maximum(n, 1))
    return Interval(mean.reshape(shape), (mean - half).reshape(shape), (mean + half).reshape(shape))


def sign_flip_p(values: npt.ArrayLike, axis: int = -1) -> Array:
    """Two-sided randomisation test that the units are distributed symmetrically about zero.

    Exact, over all 2ⁿ assignments of signs, for up to 13 units other than zero; beyond that 9,999 random
    assignments from a generator with a fixed seed, counting the one observed, so that p is never 0 and
    is the same every time. A unit that is exactly zero has no sign to flip and does not count; where all
    units are zero p is 1. The smallest possible p is 2/2ⁿ.

    Returns:
        p, without `axis`; NaN where there is no unit at all, or an infinite one.

    Source: Fisher 1935; scipy.stats.permutation_test (permutation_type="samples"), tests side by side.
    """
    columns, shape = _columns(values, axis)
    present = ~np.isnan(columns)
    units = np.where(present, columns, 0.0)
    finite = np.isfinite(units).all(-1)
    counts = np.where(finite, np.count_nonzero(units, axis=-1), 0)
    p = np.where(finite & present.any(-1), 1.0, np.nan)
    order = np.argsort(units == 0.0, axis=-1, kind="stable")
    units = np.take_along_axis(units, order, axis=-1)
    for n in np.unique(counts[counts > 1]):  # a single sign flipped is as far from zero: p = 1
        rows = np.flatnonzero(counts == n)
        for start in range(0, rows.size, _COLUMNS):
            chosen = rows[start : start + _COLUMNS]
            p[chosen] = scipy.stats.permutation_test(
                (units[chosen, :n],),
                np.sum,
                permutation_type="samples",
                vectorized=True,
                axis=-1,
                n_resamples=_RESAMPLES,
                batch=_BATCH,
                rng=np.random.default_rng(_SEED),
            ).pvalue
    return p.reshape(shape)


def recovery(effect: npt.ArrayLike, gap: npt.ArrayLike, axis: int = -1, confidence: float = 0.95) -> Interval:
    """How much of the gap the effects recover: mean(effect) / mean(gap), with Fieller's interval.

    A ratio of means, which a single pair with a small gap cannot blow up. Fieller's interval, because it
    is exact for normal units, closed in form (one call serves all sites), and bounded on both sides exactly
    where the t interval of the gap excludes zero: one condition for showing a recovery and for bounding it.
    It covered .96 where a paired BCa bootstrap covered .90 (8 units, gap 2 ± 1; 30 units: .96 and .94).

    Args:
        effect: patched − base, one per unit along `axis`.
        gap: source − base of the same units; broadcasts against `effect`. Pairs with a NaN are left out.
        axis: the units, in the broadcast shape.
        confidence: of the interval, and of the gap's.

    Returns:
        Without units and without `axis`. All three are NaN where the gap's interval includes zero.

    Source: Fieller 1954; with b, v the mean and variance of the mean of the gap, a, u those of the effect
        and c their covariance, the bounds solve (b² − t²v) r² − 2 (ab − t²c) r + (a² − t²u) = 0.
    """
    numerator, denominator = np.broadcast_arrays(np.asarray(effect, float), np.asarray(gap, float))
    both = ~np.isnan(numerator) & ~np.isnan(denominator)
    over, shape = _columns(np.where(both, numerator, np.nan), axis)
    under, _ = _columns(np.where(both, denominator, np.nan), axis)
    a, u, n = _moments(over)
    b, v, _ = _moments(under)
    deviations = np.where(~np.isnan(over), (over - a[:, None]) * (under - b[:, None]), 0.0)
    c = deviations.sum(-1) / np.where(n > 1, n - 1, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        t2 = _quantile(n, confidence) ** 2 / np.maximum(n, 1)
        square, linear, constant = b**2 - t2 * v, a * b - t2 * c, a**2 - t2 * u
        root = np.sqrt(np.maximum(linear**2 - square * constant, 0.0))
        bounded = square > 0
        found = (a / b, (linear - root) / square, (linear + root) / square)
    ratio, low, high = (np.where(bounded, part, np.nan).reshape(shape) for part in found)
    return Interval(ratio, low, high)


def false_discovery_q(p: npt.ArrayLike) -> Array:
    """Benjamini–Hochberg q values along the last axis; NaN stays NaN and is not counted.

    Source: Benjamini & Hochberg 1995, through scipy.stats.false_discovery_control.
    """
    values = np.asarray(p, dtype=float)
    q = np.full(values.shape, np.nan)
    for index in np.ndindex(values.shape[:-1]):
        tested = np.isfinite(values[index])
        if tested.any():
            q[index][tested] = scipy.stats.false_discovery_control(values[index][tested], method="bh")
    return q


def pairwise_recovery(dataset: xr.Dataset) -> xr.DataArray:
    """The seed's metric, pair by pair: effect / (source − base), [.., example, site], without units.

    0 is the base run, 1 the source run. A pair whose gap is small weighs as much as any other, so its mean
    is not the recovery of a population: that is `recovery`. NaN where the gap is exactly zero.
    """
    _expect_variables(dataset, "effect", "base", "source")
    gap = dataset["source"] - dataset["base"]
    ratio: xr.DataArray = dataset["effect"] / gap.where(gap != 0)
    return ratio.rename("pairwise_recovery").assign_attrs(units="1", long_name="effect / (source − base)")


def summarize(dataset: xr.Dataset, over: str = "example", confidence: float = 0.95) -> xr.Dataset:
    """The effect of each site over a population: interval, test and recovery.

    The unit is what the population consists of. Within one run it is the example, and what is claimed is
    claimed of this run. Where there is a dim `seed` the unit is the run: values are averaged over `over`
    first, then summarised over runs, since the examples of one run share its accidents. (Runs whose examples
    have different labels: average each, `run.mean("example")`, then `results.concat` them along `seed`.)

    Args:
        dataset: `effect [.., example, site]` (or `attribution`), `base` and `source [.., example]`, as a patching
            verb returns; `untouched` and `coasted` where it has them. Sites of the level "placebo" are no sites
            of the summary: they are what the others are compared with.
        over: the dim of the units, or of what is averaged within a run.
        confidence: of all intervals.

    Returns:
        In the measure's units, for each site and each value of any other dim (measure, step, optimizer, ...):
        `effect` with `effect_low`, `effect_high` (t interval of the mean); `p` (sign flips over units);
        `q` (Benjamini–Hochberg over the sites of one `level`, within each value of the other dims);
        `recovery` with bounds (ratio of means, Fieller; NaN unless the gap is distinguishable from zero; of one
        unit the ratio by itself, as nothing bounds it);
        `n` units. For each value of the other dims: `gap` (= source − base) with bounds, and the means of
        `base`, `source`, `untouched`, `coasted`. With placebos among the sites, `placebo`: the 95th percentile
        of |mean effect| over the placebos of a site, NaN for one without. Attributes `unit`, `confidence` and
        the dataset's own.

    Raises:
        ValueError: a variable or the dim is not there.
    """
    if "attribution" in dataset and "effect" not in dataset:
        dataset = dataset.rename(attribution="effect")
    _expect_variables(dataset, "effect", "base", "source")
    dataset, placebos = _without_placebos(dataset)
    runs = "seed" in dataset.dims
    if over not in dataset.dims and not runs:
        raise ValueError(f"the dataset has no dim '{over}'; expected one of {sorted(map(str, dataset.dims))}")
    unit = "seed" if runs else over
    names = [name for name in ("base", "source", "untouched", "coasted") if name in dataset]
    values = dataset[["effect", *names]]
    if runs and over in values.dims:
        values = values.mean(over)
    effect, gap = values["effect"], values["source"] - values["base"]

    def bounded(
        name: str, function: Callable[..., Interval], *arrays: xr.DataArray
    ) -> dict[str, xr.DataArray]:
        parts = xr.apply_ufunc(
            function,
            *arrays,
            input_core_dims=[[unit]] * len(arrays),
            output_core_dims=[[]] * 3,
            kwargs={"confidence": confidence},
        )
        return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))

    p = xr.apply_ufunc(sign_flip_p, effect, input_core_dims=[[unit]])
    found: dict[str, xr.DataArray] = {
        **bounded("effect", mean_interval, effect),
        "p": p,
        "q": _q_by_level(p),
        **bounded("recovery", recovery, effect, gap),
        "n": effect.notnull().sum(unit),
        **bounded("gap", mean_interval, gap),
        **{name: values[name].mean(unit) for name in names},
    }
    if placebos is not None:
        found["placebo"] = _placebo_quantile(
            placebos.mean([d for d in (over, "seed") if d in placebos.dims]), effect
        )
    without_units = {"p", "q", "n", "recovery", "recovery_low", "recovery_high"}
    units = dataset["effect"].attrs.get("units")
    summary = xr.Dataset(found)
    ratio = summary["effect"] / summary["gap"].where(summary["gap"] != 0)
    summary["recovery"] = summary["recovery"].where(summary["n"] != 1, ratio)
    for name in summary.data_vars:
        unit_of = "1" if name in without_units else units
        summary[name].attrs = {} if unit_of is None else {"units": unit_of}
    described = "run" if runs else f"{over}, in this run"
    return summary.assign_attrs({**dataset.attrs, "unit": described, "confidence": confidence})


def antisymmetric(dataset: xr.Dataset) -> xr.Dataset:
    """What a site does whichever of the two examples is the base: half of what it brings less what it takes away.

        effect = (sufficiency − necessity) / 2        mixing = (sufficiency + necessity) / 2

    One direction alone is no test of whether base and source differ. A step with a part of each gradient may
    measure more, or less, than both steps with one gradient, where nothing tells these two apart: that is
    `mixing`. Where base and source change places `effect` turns its sign and `mixing` stays.

    Args:
        dataset: from `both_directions`, with the dim `direction`.

    Returns:
        Without `direction`, as one direction for `summarize`: `effect`, and `mixing` with the same dims; all else
        as in the direction "sufficiency".

    Raises:
        ValueError: there is no dim `direction` with both directions, or no `effect`.
    """
    _expect_variables(dataset, "effect")
    if set(np.atleast_1d(dataset.get("direction", ""))) != {"sufficiency", "necessity"}:
        raise ValueError(
            "the dataset has not both directions along a dim 'direction'; give what dy.both_directions returns."
        )
    brings, takes = (dataset.sel(direction=which, drop=True) for which in ("sufficiency", "necessity"))
    brought, taken = brings["effect"], takes["effect"]
    found = {"effect": (brought - taken) / 2, "mixing": (brought + taken) / 2}
    return brings.assign({name: half.assign_attrs(brought.attrs) for name, half in found.items()})


def is_summary(dataset: xr.Dataset) -> bool:
    """Whether it has come out of `summarize`."""
    return "effect_low" in dataset


def can_be_summarised(dataset: xr.Dataset) -> bool:
    """Whether it has what `summarize` takes: sites, examples or runs, and both references."""
    value = "effect" if "effect" in dataset else "attribution"
    return (
        {value, "base", "source"} <= set(dataset)
        and "site" in dataset[value].dims
        and "site" not in dataset["base"].dims
        and not {"example", "seed"}.isdisjoint(dataset[value].dims)
    )


def _without_placebos(dataset: xr.Dataset) -> tuple[xr.Dataset, xr.DataArray | None]:
    """The dataset without placebo sites, and their effects."""
    levels = dataset["level"].values if "level" in dataset.coords else np.array([])
    placebo = levels == PLACEBO
    if not placebo.any():
        return dataset, None
    return dataset.isel(site=~placebo), dataset["effect"].isel(site=placebo)


def _placebo_quantile(placebos: xr.DataArray, effect: xr.DataArray) -> xr.DataArray:
    """The 95th percentile of |placebo| for each site, by the placebos' component.

    A further placebo exceeds it once in twenty times: the k-th of n draws is the k / (n + 1) quantile (Weibull).
    """
    of = placebos["component"].values
    columns = [
        abs(placebos.isel(site=of == label)).quantile(0.95, "site", method="weibull")
        if (of == label).any()
        else np.nan * placebos.isel(site=0, drop=True)
        for label in effect["site"].values
    ]
    joined = xr.concat(columns, effect["site"], coords="minimal", compat="override")
    kept = [dim for dim in effect.dims if dim in joined.dims]
    return joined.drop_vars("quantile", errors="ignore").transpose(*kept)


def top_heads(dataset: xr.Dataset, k: int = 10) -> list[tuple[int, int]]:
    """The k heads with the largest mean effect, whatever its sign, as (layer, head): largest first.

    Args:
        dataset: a raw result with `effect` or `attribution`, or a summary; with one site for each head at most,
            sites that are no head's are left out, and one value of every dim but `site`, `example` and `seed`.

    Raises:
        ValueError: a head has several sites (positions, or q and k), or another dim is left.
    """
    effect = dataset["effect" if "effect" in dataset else "attribution"]
    mean = effect.mean([d for d in ("example", "seed") if d in effect.dims]).squeeze()
    mean = mean.isel(site=np.flatnonzero(effect["head"].values >= 0))
    if mean.dims != ("site",):
        raise ValueError(f"the dataset has dims {mean.dims}; select one value of each but 'site'.")
    heads = list(zip(mean["layer"].values.tolist(), mean["head"].values.tolist(), strict=True))
    if len(set(heads)) < len(heads):
        raise ValueError(
            f"found {len(heads)} sites for {len(set(heads))} heads; select one each, as in "
            "dataset.isel(site=dataset['component'] == 'attn.z')."
        )
    order = np.argsort(-np.abs(mean.values), kind="stable")
    return [heads[i] for i in order[:k]]


def rank_correlation(one: xr.Dataset, other: xr.Dataset) -> xr.Dataset:
    """How far two results order the same sites alike: Spearman's ρ over sites, such as of attribution and patching.

    Args:
        one, other: results with `effect` or `attribution`, and the same sites and examples.

    Returns:
        `of_means`, of the means over examples, and `per_example` [example]; with the other dims they share.

    Raises:
        ValueError: sites or examples differ.
    """
    first, second = (d["effect" if "effect" in d else "attribution"] for d in (one, other))
    if any(not np.array_equal(first[dim].values, second[dim].values) for dim in ("site", "example")):
        raise ValueError("the two results have different sites or examples; expected the same, in one order")

    def ranks(values: xr.DataArray) -> xr.DataArray:
        return values.copy(data=scipy.stats.rankdata(values.values, axis=values.get_axis_num("site")))

    def spearman(a: xr.DataArray, b: xr.DataArray) -> xr.DataArray:
        return xr.corr(ranks(a), ranks(b), dim="site").assign_attrs(units="1")

    return xr.Dataset(
        {
            "of_means": spearman(first.mean("example"), second.mean("example")),
            "per_example": spearman(first, second),
        }
    )


def table(summary: xr.Dataset, n: int | None = None) -> str:
    """A summary as plain text: the sites that recover most first; those of `sites.up_to_layer` in their order.

    Sites without a recovery follow, by |effect|. The header line gives the gap and the number of units. Bars show
    |recovery|, or |effect| where no site has a recovery, beside the largest; they are left out where labels and
    numbers need their place in a width of 100.

    Args:
        summary: from `summarize`, with every dim but `site` selected or of length one.
        n: show only the first n sites.

    Raises:
        ValueError: another dim is left; says which, and how to select.
    """
    _expect_variables(summary, "effect", "recovery", "p", "q", "gap", "n")
    chosen = summary.squeeze([name for name in summary.dims if name != "site" and summary.sizes[name] == 1])
    if chosen["effect"].dims != ("site",):
        raise ValueError(
            f"the summary has dims {chosen['effect'].dims}; expected only 'site'. Select one value of each "
            "other dim, as in summary.sel(step=...)."
        )
    size, share = np.abs(chosen["effect"].values), chosen["recovery"].values
    nested = "level" in chosen.coords and set(chosen["level"].values.tolist()) == {NESTED}
    # The last key is the first to count; NaN sorts last. Sites that hold each other keep their order.
    order = np.arange(size.size) if nested else np.lexsort((-size, -share, np.isnan(share)))
    order = order[:n]
    shown = np.abs(np.where(np.isnan(share).all(), size, share))
    longest = np.nanmax(shown, initial=0.0) or 1.0
    bars = ["█" * round(_BAR * shown[i] / longest) if np.isfinite(shown[i]) else "" for i in order]
    rows: list[list[Cell]] = [["site", "effect", "", "recovery", "", "p", "q"]]
    for i in order:
        site = chosen.isel(site=i)
        effect, recovered, p, q = (float(site[name]) for name in ("effect", "recovery", "p", "q"))
        bounds = _bounds(site, "effect"), _bounds(site, "recovery")
        rows.append([str(site["site"].item()), effect, bounds[0], recovered, bounds[1], p, q])
    lines = aligned(rows)
    if len(lines[0]) + 2 + _BAR <= _WIDTH:
        lines = [f"{line}  {bar.ljust(_BAR)}" for line, bar in zip(lines, ["", *bars], strict=True)]

    counts = chosen["n"].values
    many = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    many += f" (unit: {summary.attrs['unit']})" if "unit" in summary.attrs else ""
    if counts.max() == 1:
        many += ": no intervals"
    elif "confidence" in summary.attrs:
        many += f", {100 * summary.attrs['confidence']:g} % intervals"
    gap = [number(float(chosen["gap"])), interval(*_bounds(chosen, "gap")), results.units(chosen, "gap")]
    return "\n".join([f"{' '.join(filter(None, ['gap', *gap]))}, n = {many}", *lines])


def _bounds(dataset: xr.Dataset, name: str) -> tuple[float, float]:
    return float(dataset[f"{name}_low"]), float(dataset[f"{name}_high"])


def _columns(values: npt.ArrayLike, axis: int) -> tuple[Array, tuple[int, ...]]:
    """Values as [n_tests, n_units] in float64, and the shape of one number per test."""
    moved = np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1)
    return moved.reshape(-1, moved.shape[-1]), moved.shape[:-1]


def _moments(columns: Array) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """Mean, variance (n − 1) and number of the units of each row that are not NaN."""
    present = ~np.isnan(columns)
    n = np.count_nonzero(present, axis=-1)
    with np.errstate(invalid="ignore"):  # an infinite unit makes the mean infinite, the variance NaN
        mean = np.where(present, columns, 0.0).sum(-1) / np.where(n > 0, n, np.nan)
        squares = np.where(present, columns - mean[:, None], 0.0) ** 2
        return mean, squares.sum(-1) / np.where(n > 1, n - 1, np.nan), n


def _quantile(n: npt.NDArray[np.int64], confidence: float) -> Array:
    """Student's t at the upper end of a two-sided interval with n − 1 degrees of freedom; NaN for n < 2."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1, such as 0.95")
    quantile: Array = scipy.stats.t.ppf((1 + confidence) / 2, np.where(n > 1, n - 1, np.nan))
    return quantile


def _q_by_level(p: xr.DataArray) -> xr.DataArray:
    """q values over `site`, one family for each `level` of sites and each value of the other dims."""
    ordered = p.transpose(..., "site")
    levels = p["level"].values if "level" in p.coords else np.full(p.sizes["site"], "")
    q = np.full(ordered.shape, np.nan)
    for level in np.unique(levels):
        q[..., levels == level] = false_discovery_q(ordered.values[..., levels == level])
    return ordered.copy(data=q).transpose(*p.dims)


def _expect_variables(dataset: xr.Dataset, *names: str) -> None:
    if absent := [name for name in names if name not in dataset]:
        found = sorted(map(str, dataset.data_vars))
        raise ValueError(f"the dataset has the variables {found}; expected {absent} too")
