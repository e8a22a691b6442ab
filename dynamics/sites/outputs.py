"""Sites of what flows through a model: outputs of its submodules, and positions of a sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from operator import index
from typing import Any, Literal, SupportsIndex, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from checkpoints.rng import replayed
from dynamics.batch import Batch, output_of
from dynamics.models.functional import call_with, eval_mode, is_bridge
from dynamics.sites.site import Site, SiteError, check_labels, coords_of, listed, some

Axis = Literal["layer", "head", "pos", "src"]

_HEAD_AXIS = {
    "q": 2,
    "k": 2,
    "v": 2,
    "z": 2,
    "result": 2,
    "q_input": 2,
    "k_input": 2,
    "v_input": 2,
    "rot_q": 2,
    "rot_k": 2,
    "pattern": 1,
    "attn_scores": 1,
}
"""Axis of the heads at TransformerLens's hooks."""

_POS_AXIS = {"pattern": 2, "attn_scores": 2}
"""Axis of the position, where it is not 1: of a pattern the query's is meant."""

_SRC_AXIS = {"pattern": 3, "attn_scores": 3}
"""Axis of the position attended to, at the hooks that have one."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def hooks(model: nn.Module, pattern: str = "*") -> list[str]:
    """Names of the submodules whose output can be read or exchanged, in the model's order.

    Of a TransformerBridge its hook points by TransformerLens's names.

    Raises:
        SiteError: none matches the glob.
    """
    if is_bridge(model):
        names = list(model.hook_dict)  # type: ignore[arg-type]
    else:
        names = [n for n, module in model.named_modules() if n and not isinstance(module, _CONTAINERS)]
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        raise SiteError(f"no submodule matches {pattern!r}. {type(model).__name__} has {some(names)}.")
    return matched


@listed
def activations(
    model: nn.Module, pattern: str, by: Sequence[Axis] = ("layer",), like: Any = None
) -> list[Site]:
    """Sites of the outputs of all submodules that match a glob, cut along the given axes.

    Args:
        model: any module; TransformerLens's hook names have heads and positions where it says they have.
        pattern: such as "blocks.*.hook_resid_pre".
        by: "layer" gives each module its own site (otherwise one site covers all of them); "head" and "pos"
            cut the activation. Position is axis 1 of an output [batch, pos, ...], and the query's of a
            pattern [batch, head, query, key]; "src" is the key's, of patterns and scores alone.
        like: what the model is called with, to learn shapes, where heads or positions are asked for: a
            `Batch`, a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        SiteError: nothing matches, `like` is missing or cannot be run, or an output has no such axis.
    """
    names = hooks(model, pattern)
    if unknown := set(by) - set(get_args(Axis)):
        raise SiteError(f"by={sorted(unknown)}: an activation can be cut by {', '.join(get_args(Axis))}.")
    shapes = _shapes(model, names, like) if {"head", "pos", "src"} & set(by) else {}
    sites: dict[str, Site] = {}
    places = _places(names)
    for name in names:
        layer, component = places[name]
        hook = _hook(name)
        axes = {"head": _HEAD_AXIS.get(hook), "pos": _POS_AXIS.get(hook, 1), "src": _SRC_AXIS.get(hook)}
        cuts = {what: axis for what, axis in axes.items() if what in by}
        sizes = {what: _size(name, shapes, axis, what) for what, axis in cuts.items()}
        for places_cut in product(*map(range, sizes.values())):
            at = dict(zip(sizes, places_cut, strict=True))
            numbered = layer if "layer" in by else -1
            parts = {axes[what]: place for what, place in at.items()}
            cut = tuple(parts.get(axis, slice(None)) for axis in range(max(parts) + 1)) if parts else ...  # type: ignore[type-var, operator]
            coords = coords_of("activations", component, numbered, at.get("head", -1))
            coords |= {what: place for what, place in at.items() if what != "head"}
            label = _label(component, numbered, at)
            site = sites.setdefault(label, Site(label, {}, coords))
            sites[label] = replace(site, covers={**site.covers, name: cut})
    return list(sites.values())


def _label(component: str, layer: int, at: Mapping[str, int]) -> str:
    """ "attn.z L0H2 @3", "resid_pre 1 @0", "attn.pattern L1H0 @5<-2"."""
    if "head" in at:
        label = f"{component} L{layer}H{at['head']}" if layer >= 0 else f"{component} H{at['head']}"
    else:
        label = f"{component} {layer}" if layer >= 0 else component
    label += f" @{at['pos']}" if "pos" in at else ""
    return label + (f"{'' if 'pos' in at else ' '}<-{at['src']}" if "src" in at else "")


def check_outputs(sites: Sequence[Site], model: nn.Module) -> None:
    """Raise a SiteError unless every site covers submodules of the model and labels are unique."""
    check_labels(sites)
    names = set(hooks(model))
    for site in sites:
        for name in site.covers:
            if name not in names:
                raise SiteError(
                    f"Site {site.label!r} covers {name!r}, which is no submodule with an output. "
                    f"{type(model).__name__} has {some(sorted(names))}. Make such sites with sites.activations."
                )


def attach(
    model: nn.Module, name: str, function: Callable[[nn.Module, Any, Any], Any], first: bool = False
) -> Callable[[], None]:
    """Register a forward hook on the submodule, or bridge's hook point, of that name; call the result to remove it.

    At a bridge's hook points activations come in TransformerLens's shapes (heads apart), and go back in the
    model's own. `model.hooks` is not used there: in compatibility mode it calls a hook once for every alias.

    Args:
        first: before the hooks that are there already.
    """
    if not is_bridge(model):
        return model.get_submodule(name).register_forward_hook(function, prepend=first).remove
    point: Any = model.hook_dict[name]  # type: ignore[index]
    handle = point.add_hook(lambda value, hook: function(point, (), value), prepend=first)

    def remove() -> None:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)

    return remove


@listed
def at_positions(sites: Sequence[Site], positions: Mapping[str, SupportsIndex | Sequence[int]]) -> list[Site]:
    """Every site once per named position: what that position contributes to the gradient of its parameters.

    For `patch_parameters` it is where another checkpoint's parameters act.

    Args:
        sites: parameter sites.
        positions: name -> position or positions, such as {"tag": 0, "alias": 1, "integer": 2}.
    """
    return [
        replace(
            site,
            label=f"{site.label} @ {name}",
            coords={**site.coords, "position": name},
            positions=_positions(where),
        )
        for site in sites
        for name, where in positions.items()
    ]


def _positions(where: SupportsIndex | Sequence[int]) -> tuple[int, ...]:
    try:
        return (index(where),)  # type: ignore[arg-type]
    except TypeError:
        return tuple(map(index, where))  # type: ignore[arg-type]


def _hook(name: str) -> str:
    """What TransformerLens's hook is called, without its prefix; "" for any other module."""
    last = name.rpartition(".")[2]
    return last.removeprefix("hook_") if last.startswith("hook_") else ""


def _places(names: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Layer (−1 if none) and component of each module: "blocks.0.attn.hook_z" is (0, "attn.z").

    The layer is the first number in the name. Components that would mean several modules of one layer are
    written out, with a star for the layer: "encoder.*.up" and "decoder.*.up".
    """
    found: dict[str, tuple[int, str, str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None or len(parts) == 1:  # "0" of a bare nn.Sequential is its own name
            found[name] = (-1, ".".join(part.removeprefix("hook_") for part in parts), name)
            continue
        within = parts[number + 1 :] or parts[:number]
        short = ".".join(part.removeprefix("hook_") for part in within)
        found[name] = (int(parts[number]), short, ".".join([*parts[:number], "*", *parts[number + 1 :]]))
    meant = Counter({(short, out) for _, short, out in found.values()})
    ambiguous = Counter(short for short, _ in meant)
    return {
        name: (layer, short if ambiguous[short] == 1 else out) for name, (layer, short, out) in found.items()
    }


def _shapes(model: nn.Module, names: Sequence[str], like: Any) -> dict[str, torch.Size]:
    """Shape of each module's first floating-point output on one call of the model, which stays as it is."""
    if like is None:
        raise SiteError(
            "cutting by head or pos needs like=: a Batch, or what the model is called with (a tensor, a tuple "
            "of arguments, a dict of keyword arguments)."
        )
    shapes: dict[str, torch.Size] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        if found:
            shapes.setdefault(name, found[0].shape)

    handles: list[Callable[[], None]] = []
    try:
        for name in names:
            handles.append(attach(model, name, partial(keep, name)))
        with torch.no_grad(), eval_mode(model), replayed(None):
            if is_bridge(model):
                called(model, like)
            else:
                tensors = {
                    n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())
                }
                call_with(called, model, tensors, like)
    except Exception as error:
        raise SiteError(
            f"{type(model).__name__} cannot be called with like={type(like).__name__}: {error}. Give a Batch, a "
            "tensor, a tuple of arguments or a dict of keyword arguments."
        ) from error
    finally:
        for remove in handles:
            remove()
    return shapes


def called(model: nn.Module, like: Any) -> Any:
    """The model called with a `Batch`, a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(like, Batch):
        return output_of(model, like)
    if isinstance(like, Mapping):
        return model(**like)
    return model(*like) if isinstance(like, tuple) else model(like)


def _size(name: str, shapes: Mapping[str, torch.Size], axis: int | None, what: str) -> int:
    if axis is None:
        having = _HEAD_AXIS if what == "head" else _SRC_AXIS
        described = "of heads" if what == "head" else f"for {what}"
        raise SiteError(
            f"the output of {name!r} has no axis {described} that is known; TransformerLens's hooks "
            f"{', '.join(having)} have one. Leave out {what!r}, or write Site({name!r}, {{{name!r}: index}})."
        )
    if name not in shapes:
        raise SiteError(f"{name!r} gave no floating-point tensor when the model was called on like=.")
    if len(shapes[name]) <= max(axis, 1 if what == "pos" else 0) or (what == "pos" and len(shapes[name]) < 3):
        raise SiteError(
            f"the output of {name!r} has shape {tuple(shapes[name])}, and no axis {axis} for {what}."
        )
    return shapes[name][axis]
