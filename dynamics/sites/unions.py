"""The union of several sites as one, and all that a site leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType

from torch import nn

from dynamics.sites.site import Site, SiteError, check, check_whole, coords_of
from dynamics.trees import Index, mask


def union(model: nn.Module, sites: Sequence[Site], label: str | None = None) -> Site:
    """One site that covers what any of the given ones covers.

    Args:
        model: whose parameters and buffers they cover.
        sites: at least one; all with the same positions.
        label: of the union; by default the labels joined by " + ".

    Raises:
        SiteError: no sites, different positions, or a site that does not fit the model.
    """
    if len({site.positions for site in sites}) != 1:
        raise SiteError("a union is of one or more sites, all with the same positions or all without.")
    check(sites, model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    covers: dict[str, Index] = {}
    for site in sites:
        for name, index in site.covers.items():
            if name not in covers:
                covers[name] = index
            elif isinstance(index, EllipsisType) or isinstance(covers[name], EllipsisType):
                covers[name] = ...
            else:
                shape, device = tensors[name].shape, tensors[name].device
                covers[name] = mask(covers[name], shape, device) | mask(index, shape, device)
    joined = " + ".join(site.label for site in sites) if label is None else label
    return Site(joined, covers, coords_of("union", joined), sites[0].positions)


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
