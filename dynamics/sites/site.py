"""Site: a named part of a model whose gradient, update or signal is exchanged; what every constructor shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from types import EllipsisType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from checkpoints.html import table
from dynamics.site_coordinates import SITE_COORDS
from dynamics.sites.families import other_names
from dynamics.trees import Index, mask


class SiteError(ValueError):
    """A site that the model does not have; the message says which sites it has."""


@dataclass(frozen=True, eq=False, repr=False)
class Site:
    """A label, what it covers, and where that stands in the model.

    Attributes:
        label: unique within a list of sites.
        covers: name of a parameter or buffer, or for `patch_signals` of a submodule whose output is meant,
            -> index: `...`, a tuple of ints, slices and at most one integer tensor, or a boolean mask.
        coords: labels along the `site` dim: `level`, `component`, and `layer`, `head`, `pos` where they exist.
        positions: sequence positions whose contributions to a parameter's gradient are meant, or at which another
            checkpoint's parameter acts (`patch_parameters`); None for all.
    """

    label: str
    covers: Mapping[str, Index]
    coords: Mapping[str, str | int] = field(default_factory=dict)
    positions: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        known: dict[str, Any] = {n: v for n, v in self.coords.items() if v != SITE_COORDS.get(n)}
        if self.positions is not None:
            known["positions"] = self.positions
        parts = [repr(self.label), self._covered(), *(f"{name}={value!r}" for name, value in known.items())]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _covered(self) -> str:
        """What the site covers, in words: `part of blocks.0.attn.W_Q and 3 more`."""
        if not self.covers:
            return "nothing"
        first, *others = self.covers
        whole = all(isinstance(index, EllipsisType) for index in self.covers.values())
        return f"{'all' if whole else 'part'} of {first}" + (f" and {len(others)} more" if others else "")


SomeSite = TypeVar("SomeSite", bound=Site)
Arguments = ParamSpec("Arguments")

_SHOWN = 16  # rows of a list of sites in a notebook


class Sites(list[SomeSite]):
    """A list of sites, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        head = ["label", "level", "layer", "head", "covers"]
        rows = [
            [s.label, *("" if s.coords.get(n, -1) == -1 else s.coords[n] for n in head[1:4]), s._covered()]
            for s in self[:_SHOWN]
        ]
        more = f", the first {_SHOWN}" if len(self) > _SHOWN else ""
        return table(f"{len(self)} sites{more}", head, rows)


def listed(make: Callable[Arguments, list[SomeSite]]) -> Callable[Arguments, list[SomeSite]]:
    """A constructor of sites whose list a notebook shows as a table."""

    @wraps(make)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> list[SomeSite]:
        return Sites(make(*args, **kwargs))

    return made


_FITTED: WeakKeyDictionary[Site, dict[str, torch.Size]] = WeakKeyDictionary()
"""Shapes of the tensors that a site was found to lie inside: verbs are called again with the same sites."""


def check(sites: Sequence[Site], model: nn.Module) -> None:
    """Raise a SiteError unless every site lies inside the model and labels are unique."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    first = {other: name for name, others in other_names(model).items() for other in others}
    check_labels(sites)
    for site in sites:
        fitted = _FITTED.setdefault(site, {})
        for name, index in site.covers.items():
            if name in first:
                raise SiteError(
                    f"Site {site.label!r} covers {name!r}, but the model has {first[name]}: the same tensor, tied. "
                    "Cover it by that name; sites.matching finds it by either."
                )
            if name not in tensors:
                raise SiteError(
                    f"Site {site.label!r} covers {name!r}, but the model has {some(list(tensors))}."
                )
            if fitted.get(name) != tensors[name].shape:
                check_index(site.label, name, index, tensors[name])
                fitted[name] = tensors[name].shape


def check_labels(sites: Sequence[Site]) -> None:
    """Raise a SiteError where a label is used twice or a site covers nothing."""
    repeated = sorted(label for label, n in Counter(site.label for site in sites).items() if n > 1)
    if repeated:
        raise SiteError(f"Site labels {some(repeated)} occur more than once; a result is read by its labels.")
    for site in sites:
        if not site.covers:
            raise SiteError(f"Site {site.label!r} covers nothing.")


def check_whole(sites: Sequence[Site], verb: str, instead: str) -> None:
    """Raise a SiteError where a site has positions and the verb exchanges what has none."""
    for site in sites:
        if site.positions is not None:
            raise SiteError(f"Site {site.label!r} has positions, which {verb} cannot exchange: {instead}.")


def is_partition(sites: Sequence[Site], model: nn.Module) -> bool:
    """Whether every element of every trained parameter is in exactly one of the sites."""
    covered = {
        n: torch.zeros_like(p, dtype=torch.int8) for n, p in model.named_parameters() if p.requires_grad
    }
    for site in sites:
        for name, index in site.covers.items():
            if name in covered:
                reached = mask(index, covered[name].shape, covered[name].device)
                if bool(covered[name][reached].any()):
                    return False
                covered[name][reached] = 1
    return all(bool(count.all()) for count in covered.values())


def check_index(label: str, name: str, index: Index, tensor: Tensor) -> None:
    shape = tuple(tensor.shape)
    if isinstance(index, EllipsisType):
        return
    if isinstance(index, Tensor):
        if tuple(index.shape) != shape or index.dtype != torch.bool:
            raise SiteError(
                f"Site {label!r} masks {name!r} with a {index.dtype} tensor of shape {tuple(index.shape)}; "
                f"it must be boolean and of shape {shape}."
            )
        return
    if not isinstance(index, tuple) or not all(_is_part(part) for part in index) or _n_tensors(index) > 1:
        raise SiteError(
            f"Site {label!r} covers {index!r} of {name!r}; it must be `...`, a tuple of ints and slices such as "
            "(2,) or (slice(0, 4),) with at most one 1-D integer tensor, or a boolean mask."
        )
    if len(index) > len(shape):
        raise SiteError(f"Site {label!r} indexes {len(index)} axes of {name!r}, which has shape {shape}.")
    for axis, (part, size) in enumerate(zip(index, shape, strict=False)):
        if isinstance(part, slice):
            if part.stop is not None and part.stop > size:
                raise SiteError(
                    f"Site {label!r} slices axis {axis} of {name!r} to {part.stop}, which has {size}."
                )
            if not range(size)[part]:
                raise SiteError(f"Site {label!r} takes nothing on axis {axis} of {name!r}, which has {size}.")
            continue
        places = part.tolist() if isinstance(part, Tensor) else [part]
        if not places:
            raise SiteError(f"Site {label!r} takes nothing on axis {axis} of {name!r}, which has {size}.")
        for place in places:
            if not -size <= place < size:
                raise SiteError(
                    f"Site {label!r} reads index {place} on axis {axis} of {name!r}, which has {size} "
                    f"(0-{size - 1}). sites.heads(model) lists a transformer's heads."
                )


def _is_part(part: object) -> bool:
    return (isinstance(part, int | slice) and not isinstance(part, bool)) or (
        isinstance(part, Tensor) and part.ndim == 1 and part.dtype == torch.int64
    )


def _n_tensors(index: tuple[object, ...]) -> int:
    return sum(isinstance(part, Tensor) for part in index)


def coords_of(level: str, component: str, layer: int = -1, head: int = -1) -> dict[str, str | int]:
    return {"level": level, "component": component, "layer": layer, "head": head}


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
