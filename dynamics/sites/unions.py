"""The union of several sites as one, and all that a site leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor, nn

from dynamics.sites.outputs import check_outputs
from dynamics.sites.site import Site, SiteError, check, check_whole, coords_of
from dynamics.trees import Index, mask


def union(model: nn.Module, sites: Sequence[Site], label: str | None = None) -> Site:
    """One site that covers what any of the given ones covers.

    Args:
        model: whose parameters and buffers, or whose submodules' outputs, they cover.
        sites: at least one; all with the same positions. Of outputs those at one hook differ along one axis at
            most, such as heads do, or positions.
        label: of the union; by default the labels joined by " + ".

    Raises:
        SiteError: no sites, different positions, a site that does not fit the model, or cuts of an output that no
            one index covers.
    """
    if len({site.positions for site in sites}) != 1:
        raise SiteError("a union is of one or more sites, all with the same positions or all without.")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    of_outputs = not any(name in tensors for site in sites for name in site.covers)
    if of_outputs:
        check_outputs(sites, model)
    else:
        check(sites, model)
    covers: dict[str, Index] = {}
    for site in sites:
        for name, index in site.covers.items():
            if name not in covers:
                covers[name] = index
            elif isinstance(index, EllipsisType) or isinstance(covers[name], EllipsisType):
                covers[name] = ...
            elif of_outputs:
                covers[name] = _both(name, covers[name], index)
            else:
                shape, device = tensors[name].shape, tensors[name].device
                covers[name] = mask(covers[name], shape, device) | mask(index, shape, device)
    joined = " + ".join(site.label for site in sites) if label is None else label
    return Site(joined, covers, coords_of("union", joined), sites[0].positions)


def _both(name: str, one: Index, other: Index) -> Index:
    """One index for what two reach of an output, whose shape is not known before the model runs."""
    refused = SiteError(
        f"the sites cut {name!r} by {one!r} and by {other!r}; a union is of cuts that differ along one axis, in "
        "whole numbers. Cut by head alone, or by position alone."
    )
    if not (isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other)):
        raise refused
    axes = [axis for axis, parts in enumerate(zip(one, other, strict=True)) if not _equal(*parts)]
    if not axes:
        return one
    numbers = [one[axes[0]], other[axes[0]]]
    others = [part for axis, part in enumerate(one) if axis != axes[0]]
    if (
        len(axes) > 1
        or any(isinstance(n, slice) for n in numbers)
        or any(isinstance(p, Tensor) for p in others)
    ):
        raise refused
    places = torch.cat([torch.as_tensor(number).reshape(-1) for number in numbers])
    return (*one[: axes[0]], torch.unique(places), *one[axes[0] + 1 :])


def _equal(one: int | slice | Tensor, other: int | slice | Tensor) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return one == other


def complement(model: nn.Module, site: Site) -> Site:
    """All parameters that a site does not cover.

    Raises:
        SiteError: the site has positions, or does not fit the model.
    """
    check_whole([site], "complement", "leave them out")
    check([site], model)
    covers: dict[str, Index] = {}
    for name, parameter in model.named_parameters():
        if name not in site.covers:
            covers[name] = ...
        elif not isinstance(site.covers[name], EllipsisType):
            rest = ~mask(site.covers[name], parameter.shape, parameter.device)
            covers |= {name: rest} if bool(rest.any()) else {}
    return Site(f"all but {site.label}", covers, coords_of("complement", f"all but {site.label}"))
