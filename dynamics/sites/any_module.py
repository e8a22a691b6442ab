"""Sites of any module: whole parameters, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from dynamics.sites.site import Site, SiteError, coords_of, layer_of, some


def parameters(model: nn.Module) -> list[Site]:
    """One site per parameter tensor."""
    return [
        Site(name, {name: ...}, coords_of("parameters", name, layer_of(name)))
        for name, _ in model.named_parameters()
    ]


def everything(model: nn.Module) -> Site:
    """All parameters and buffers: exchanged here, the base step becomes the source step."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return Site("everything", dict.fromkeys(names, ...), coords_of("everything", "everything"))


def matching(
    model: nn.Module, patterns: Mapping[str, str | Sequence[str]], exclude: str | Sequence[str] = ()
) -> list[Site]:
    """One site per label, covering the parameters whose names match its globs.

    Args:
        model: any module.
        patterns: label -> glob or globs, such as {"encoder": "encoder.*"}.
        exclude: globs of names that no site covers.

    Raises:
        SiteError: a label matches nothing.
    """
    excluded = _globs(exclude)
    names = [n for n, _ in model.named_parameters() if not any(fnmatchcase(n, g) for g in excluded)]
    sites = []
    for label, globs in patterns.items():
        matched = [n for n in names if any(fnmatchcase(n, g) for g in _globs(globs))]
        if not matched:
            raise SiteError(
                f"Site {label!r}: no parameter matches {_globs(globs)}. The model has {some(names)}."
            )
        layers = {layer_of(n) for n in matched}
        sites.append(
            Site(
                label,
                dict.fromkeys(matched, ...),
                coords_of("matching", label, *(layers if len(layers) == 1 else ())),
            )
        )
    return sites


def _globs(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
