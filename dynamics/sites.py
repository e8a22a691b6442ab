"""Sites: named parts of a model's parameters whose gradient or update is exchanged.

A site is a value; a list of sites is patched one by one and never as a union, so sites may overlap.
Constructors read the parameter names of TransformerLens (`blocks.0.attn.W_Q` with heads on its first
axis); `parameters`, `matching` and `everything` take any module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import EllipsisType

import torch
from torch import Tensor, nn

from dynamics.trees import Index


class SiteError(ValueError):
    """A site that the model does not have; the message says which sites it has."""


@dataclass(frozen=True, eq=False)
class Site:
    """A label, what it covers, and where that stands in the model.

    Attributes:
        label: unique within a list of sites.
        covers: parameter (or buffer) name -> index: `...`, a tuple of ints and slices, or a boolean mask.
        coords: labels along the `site` dim: `level`, `component`, and `layer`, `head` where they exist.
    """

    label: str
    covers: Mapping[str, Index]
    coords: Mapping[str, str | int] = field(default_factory=dict)


# --- any module -------------------------------------------------------------------------------------------


def parameters(model: nn.Module) -> list[Site]:
    """One site per parameter tensor."""
    return [
        Site(name, {name: ...}, _coords("parameters", name, _layer(name)))
        for name, _ in model.named_parameters()
    ]


def everything(model: nn.Module) -> Site:
    """All parameters and buffers: exchanged here, the base step becomes the source step."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return Site("everything", dict.fromkeys(names, ...), _coords("everything", "everything"))


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
                f"Site {label!r}: no parameter matches {_globs(globs)}. The model has {_some(names)}."
            )
        layers = {_layer(n) for n in matched}
        sites.append(
            Site(
                label,
                dict.fromkeys(matched, ...),
                _coords("matching", label, *(layers if len(layers) == 1 else ())),
            )
        )
    return sites


# --- models with TransformerLens names --------------------------------------------------------------------


def layers(model: nn.Module) -> list[Site]:
    """One site per block: everything in it."""
    return [
        Site(f"block {layer}", _whole(model, f"blocks.{layer}."), _coords("layers", "block", layer))
        for layer in range(_n_layers(model))
    ]


def components(model: nn.Module) -> list[Site]:
    """A partition of all parameters: embeddings, per block attn / mlp / ln, final norm, unembedding."""
    sites = [
        Site("embed", _whole(model, "embed."), _coords("components", "embed")),
        Site("pos_embed", _whole(model, "pos_embed."), _coords("components", "pos_embed")),
    ]
    for layer in range(_n_layers(model)):
        for component, prefixes in {"attn": ["attn."], "mlp": ["mlp."], "ln": ["ln1.", "ln2."]}.items():
            covers = _whole(model, *(f"blocks.{layer}.{prefix}" for prefix in prefixes))
            sites.append(Site(f"{component} {layer}", covers, _coords("components", component, layer)))
    sites += [
        Site("ln_final", _whole(model, "ln_final."), _coords("components", "ln_final")),
        Site("unembed", _whole(model, "unembed."), _coords("components", "unembed")),
    ]
    return [site for site in sites if site.covers]


_HEAD_PARTS = {"W_Q": "Q", "W_K": "K", "W_V": "V", "W_O": "O", "b_Q": "Q", "b_K": "K", "b_V": "V"}


def heads(model: nn.Module) -> list[Site]:
    """One site per attention head: its W_Q, W_K, W_V, W_O and their biases (b_O belongs to no head)."""
    return [
        Site(f"L{layer}H{head}", _of_head(model, layer, head, "QKVO"), _coords("heads", "head", layer, head))
        for layer, head in _heads(model)
    ]


def circuits(model: nn.Module) -> list[Site]:
    """Two sites per head: QK, which decides where it attends, and OV, what it moves (Elhage et al. 2021)."""
    return [
        Site(
            f"{name} L{layer}H{head}",
            _of_head(model, layer, head, parts),
            _coords("circuits", name, layer, head),
        )
        for name, parts in (("QK", "QK"), ("OV", "VO"))
        for layer, head in _heads(model)
    ]


def matrices(model: nn.Module) -> list[Site]:
    """A partition of all parameters into matrices, each with its bias.

    W_E, W_pos, per head W_Q, W_K, W_V and W_O, per block b_O, W_in, W_out and norms, final norm, W_U.
    """
    sites = [
        Site(name, _whole(model, prefix), _coords("matrices", name))
        for name, prefix in (("W_E", "embed."), ("W_pos", "pos_embed."))
    ]
    every_head = _heads(model)
    for layer in range(_n_layers(model)):
        block = f"blocks.{layer}."
        sites += [
            Site(
                f"W_{part} L{layer}H{head}",
                _of_head(model, layer, head, part),
                _coords("matrices", f"W_{part}", layer, head),
            )
            for part in "QKVO"
            for of_layer, head in every_head
            if of_layer == layer
        ]
        for name, suffixes in {
            "b_O": ["attn.b_O"],
            "W_in": ["mlp.W_in", "mlp.b_in"],
            "W_out": ["mlp.W_out", "mlp.b_out"],
            "ln1.w,b": ["ln1."],
            "ln2.w,b": ["ln2."],
        }.items():
            covers = _whole(model, *(block + suffix for suffix in suffixes))
            sites.append(Site(f"{name} {layer}", covers, _coords("matrices", name, layer)))
    sites += [
        Site(name, _whole(model, prefix), _coords("matrices", name))
        for name, prefix in (("ln_final.w,b", "ln_final."), ("W_U", "unembed."))
    ]
    return [site for site in sites if site.covers]


def up_to_layer(model: nn.Module) -> list[Site]:
    """The seed's cumulative order: the embeddings, then with block 0, with block 1, ..., then all."""
    covers = _whole(model, "embed.", "pos_embed.")
    sites = [Site("embeddings", dict(covers), _coords("up_to_layer", "embeddings"))]
    for layer in range(_n_layers(model)):
        covers |= _whole(model, f"blocks.{layer}.")
        sites.append(Site(f"+ block {layer}", dict(covers), _coords("up_to_layer", "up to block", layer)))
    names = [name for name, _ in model.named_parameters()]
    return [
        *sites,
        Site("+ unembedding", dict.fromkeys(names, ...), _coords("up_to_layer", "up to unembedding")),
    ]


LEVELS = {
    "layers": layers,
    "components": components,
    "heads": heads,
    "circuits": circuits,
    "matrices": matrices,
    "up_to_layer": up_to_layer,
}
"""The levels of detail a study goes through, coarse ones first."""


# --- checking ---------------------------------------------------------------------------------------------


def check(sites: Sequence[Site], model: nn.Module) -> None:
    """Raise a SiteError unless every site lies inside the model and labels are unique."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    labels = [site.label for site in sites]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise SiteError(
            f"Site labels {_some(repeated)} occur more than once; a result is read by its labels."
        )
    for site in sites:
        if not site.covers:
            raise SiteError(f"Site {site.label!r} covers nothing.")
        for name, index in site.covers.items():
            if name not in tensors:
                raise SiteError(
                    f"Site {site.label!r} covers {name!r}, but the model has {_some(list(tensors))}."
                )
            _check_index(site.label, name, index, tensors[name])


def _check_index(label: str, name: str, index: Index, tensor: Tensor) -> None:
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
    if not isinstance(index, tuple) or not all(isinstance(part, int | slice) for part in index):
        raise SiteError(
            f"Site {label!r} covers {index!r} of {name!r}; it must be `...`, a tuple of ints and slices such as "
            "(2,) or (slice(0, 4),), or a boolean mask."
        )
    if len(index) > len(shape):
        raise SiteError(f"Site {label!r} indexes {len(index)} axes of {name!r}, which has shape {shape}.")
    for axis, (part, size) in enumerate(zip(index, shape, strict=False)):
        if isinstance(part, int) and not -size <= part < size:
            raise SiteError(
                f"Site {label!r} reads index {part} on axis {axis} of {name!r}, which has {size} (0-{size - 1}). "
                f"sites.heads(model) lists a transformer's heads."
            )
        if isinstance(part, slice) and part.stop is not None and part.stop > size:
            raise SiteError(
                f"Site {label!r} slices axis {axis} of {name!r} to {part.stop}, which has {size}."
            )
        if isinstance(part, slice) and not range(size)[part]:
            raise SiteError(f"Site {label!r} takes nothing on axis {axis} of {name!r}, which has {size}.")


# --- names ------------------------------------------------------------------------------------------------


def _coords(level: str, component: str, layer: int = -1, head: int = -1) -> dict[str, str | int]:
    return {"level": level, "component": component, "layer": layer, "head": head}


def _globs(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _layer(name: str) -> int:
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _n_layers(model: nn.Module) -> int:
    n = 1 + max((_layer(name) for name, _ in model.named_parameters()), default=-1)
    if n == 0:
        raise SiteError(
            f"{type(model).__name__} has no parameters named blocks.0... as TransformerLens names them. "
            "Use sites.parameters(model) or sites.matching(model, {label: glob})."
        )
    return n


def _whole(model: nn.Module, *prefixes: str) -> dict[str, Index]:
    return {name: ... for name, _ in model.named_parameters() if name.startswith(prefixes)}


def _heads(model: nn.Module) -> list[tuple[int, int]]:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = []
    for layer in range(_n_layers(model)):
        name = f"blocks.{layer}.attn.W_Q"
        if len(shapes.get(name, ())) != 3:
            raise SiteError(
                f"{type(model).__name__} has no {name} of shape [n_heads, d_model, d_head], so its heads are not "
                "slices of one axis. Use sites.matching(model, {label: glob})."
            )
        found += [(layer, head) for head in range(shapes[name][0])]
    return found


def _of_head(model: nn.Module, layer: int, head: int, parts: str) -> dict[str, Index]:
    present = {name for name, _ in model.named_parameters()}
    names = (f"blocks.{layer}.attn.{name}" for name, part in _HEAD_PARTS.items() if part in parts)
    return {name: (head,) for name in names if name in present}
