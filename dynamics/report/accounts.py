"""Accounts of training as stacked areas: what was written since the beginning, by site and by source."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from dynamics import results
from dynamics.report.figure import Figure, loaded, made_by
from dynamics.report.runs import Result, Run

POINTS = 300
"""Steps of an account that are drawn, at most."""


def stacks(run: Run, result: Result) -> Iterator[Figure]:
    """Two pictures of an account: by source, where it has any, and by site."""
    account = result.dataset
    kinds = [dim for dim in ("source", "site") if dim in account["attribution"].dims]
    levels = list(dict.fromkeys(account["level"].values.tolist()))
    for kind in kinds:
        chosen = account if kind == "site" else account.isel(site=account["level"].values == levels[0])
        shown = written(chosen, kind)
        of_level = (
            f'account = account.isel(site=account["level"].values == "{levels[0]}")\n' if levels[1:] else ""
        )
        yield Figure(
            "stack",
            f"What was written, by {kind}",
            "What raised the measure since the beginning is stacked above zero, what lowered it below. The line "
            "is the measure's own change, which is their sum but for a residual"
            + (f"; sources are summed over the sites of the level {levels[0]}." if kind == "source" else "."),
            shown,
            (*made_by(run, result), f"dynamics show {result.path}"),
            f"{loaded(result, 'account')}\n{of_level}{_example(account)}dy.plots.account(chosen)",
            {"parts": kind, "phases": {n: s for n, s in run.phases.items() if n != "end"}},
        )


def _example(account: xr.Dataset) -> str:
    """Lines that choose one measure and one example of an account."""
    measure = ".isel(measure=0)" if "measure" in account.dims else ""
    if "example" not in account.dims:
        others = [dim for dim in account["value"].dims if dim not in ("step", "measure")]
        first = "".join(f".isel({dim}=0)" for dim in others)
        return f"chosen = account{measure}{first}\n"
    if {"Dt3", "Df4"} <= set(account["example"].values.tolist()):
        return f'chosen = dy.results.difference(account{measure}, "Dt3", "Df4")\n'
    return f"chosen = account{measure}.isel(example=0)\n"


def written(account: xr.Dataset, kind: str) -> xr.Dataset:
    """Running sums of an account over all but sites, or all but sources, at 300 of its steps at most.

    Args:
        account: of `attribute_training`.
        kind: "site" or "source": the dim that stays.

    Returns:
        `written` [.., step, kind]; `change` [.., step], the measure less its beginning. Where there are the
        examples Dt3 and Df4, their difference is an example too, the first.
    """
    summed = [dim for dim in ("source", "site") if dim in account["attribution"].dims and dim != kind]
    found = xr.Dataset(
        {
            "written": account["attribution"].sum(summed).cumsum("step"),
            "change": account["value"] - account["value"].isel(step=0, drop=True),
        }
    ).assign_coords({kind: account[kind], "step": account["step"]})
    units = results.units(account, "attribution")
    for name, words in (("written", "written since the beginning"), ("change", "change of the measure")):
        found[name].attrs = {"long_name": words, **({"units": units} if units else {})}
    if "example" in account.dims and {"Dt3", "Df4"} <= set(account["example"].values.tolist()):
        gap = results.difference(found, "Dt3", "Df4").expand_dims("example")
        found = xr.concat([gap, found], "example", combine_attrs="override")
    places = np.unique(
        np.linspace(0, found.sizes["step"] - 1, min(POINTS, found.sizes["step"])).round().astype(int)
    )
    return found.isel(step=places)
