"""Sites of any module: whole parameters, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from dynamics.sites.families import layer_of, other_names, tied
from dynamics.sites.site import Site, SiteError, coords_of, listed, some


@listed
def parameters(model: nn.Module) -> list[Site]:
    """One site per parameter tensor; the label of a tied one lists its further names."""
    others = other_names(model)
    return [
        Site(tied(name, others.get(name, ())), {name: ...}, coords_of("parameters", name, layer_of(name)))
        for name, _ in model.named_parameters()
    ]


def everything(model: nn.Module) -> Site:
    """All parameters and buffers: exchanged here, the base step becomes the source step."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return Site("everything", dict.fromkeys(names, ...), coords_of("everything", "everything"))


@listed
def matching(
    model: nn.Module, patterns: Mapping[str, str | Sequence[str]], exclude: str | Sequence[str] = ()
) -> list[Site]:
    """One site per label, covering the parameters whose names match its globs.

    A tied parameter is found by any of its names and covered under its first.

    Args:
        model: any module.
        patterns: label -> glob or globs, such as {"encoder": "encoder.*"}.
        exclude: globs of names that no site covers.

    Raises:
        SiteError: a label matches nothing.
    """
    others = other_names(model)
    names = {name: [name, *others.get(name, ())] for name, _ in model.named_parameters()}
    names = {name: known for name, known in names.items() if not _match(known, _globs(exclude))}
    sites = []
    for label, globs in patterns.items():
        matched = [name for name, known in names.items() if _match(known, _globs(globs))]
        if not matched:
            raise SiteError(
                f"Site {label!r}: no parameter matches {_globs(globs)}. The model has {some(list(names))}."
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


def _match(names: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _globs(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
