"""The finest sites: single neurons, and single rows of a parameter such as an embedding."""

from __future__ import annotations

from torch import nn

from dynamics.sites.families import layer_of
from dynamics.sites.site import Site, SiteError, coords_of, listed, some
from dynamics.trees import Index

_OF_NEURON = {"W_in": 1, "W_gate": 1, "b_in": 0, "b_gate": 0, "W_out": 0}
"""The axis along which a block's neurons lie, by the last part of a parameter's name."""


@listed
def neurons(model: nn.Module) -> list[Site]:
    """One site per MLP neuron: its column of W_in (and W_gate), its b_in, its row of W_out.

    Coordinates: `layer` and `neuron`. The bias b_out belongs to no neuron.

    Raises:
        SiteError: the model has no blocks.*.mlp.W_in as TransformerLens names them.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = []
    for name in (name for name in shapes if layer_of(name) >= 0 and name.endswith(".mlp.W_in")):
        layer, mlp = layer_of(name), name.removesuffix("W_in")
        parts = {f"{mlp}{part}": axis for part, axis in _OF_NEURON.items() if f"{mlp}{part}" in shapes}
        for i in range(shapes[name][1]):
            covers: dict[str, Index] = {n: (*[slice(None)] * axis, i) for n, axis in parts.items()}
            found.append(
                Site(f"L{layer}N{i}", covers, {**coords_of("neurons", "neuron", layer), "neuron": i})
            )
    if not found:
        raise SiteError(
            f"{type(model).__name__} has no parameters named blocks.0.mlp.W_in as TransformerLens names them. "
            "Use sites.rows(model, name), or Site(label, {name: (slice(None), i)}) for columns."
        )
    return found


@listed
def rows(model: nn.Module, name: str) -> list[Site]:
    """One site for each index of a parameter's first axis: a token of an embedding, a unit of a Linear.

    Coordinates: `layer`, `component` (the name) and `index`.

    Raises:
        SiteError: the model has no such parameter, or it has no axes.
    """
    parameters = dict(model.named_parameters())
    if name not in parameters or parameters[name].ndim == 0:
        raise SiteError(
            f"{type(model).__name__} has no parameter {name!r} with rows; it has {some(list(parameters))}."
        )
    coords = coords_of("rows", name, layer_of(name))
    return [Site(f"{name} {i}", {name: (i,)}, {**coords, "index": i}) for i in range(len(parameters[name]))]
