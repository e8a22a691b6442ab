"""Sites of transformers: layers, components, heads, circuits, matrices."""

from __future__ import annotations

from torch import nn

from dynamics.sites.site import Site, SiteError, coords_of, layer_of
from dynamics.trees import Index


def layers(model: nn.Module) -> list[Site]:
    """One site per block: everything in it."""
    return [
        Site(f"block {layer}", _whole(model, f"blocks.{layer}."), coords_of("layers", "block", layer))
        for layer in range(_n_layers(model))
    ]


def components(model: nn.Module) -> list[Site]:
    """A partition of all parameters: embeddings, per block attn / mlp / ln, final norm, unembedding."""
    sites = [
        Site("embed", _whole(model, "embed."), coords_of("components", "embed")),
        Site("pos_embed", _whole(model, "pos_embed."), coords_of("components", "pos_embed")),
    ]
    for layer in range(_n_layers(model)):
        for component, prefixes in {"attn": ["attn."], "mlp": ["mlp."], "ln": ["ln1.", "ln2."]}.items():
            covers = _whole(model, *(f"blocks.{layer}.{prefix}" for prefix in prefixes))
            sites.append(Site(f"{component} {layer}", covers, coords_of("components", component, layer)))
    sites += [
        Site("ln_final", _whole(model, "ln_final."), coords_of("components", "ln_final")),
        Site("unembed", _whole(model, "unembed."), coords_of("components", "unembed")),
    ]
    return [site for site in sites if site.covers]


_HEAD_PARTS = {"W_Q": "Q", "W_K": "K", "W_V": "V", "W_O": "O", "b_Q": "Q", "b_K": "K", "b_V": "V"}


def heads(model: nn.Module) -> list[Site]:
    """One site per attention head: its W_Q, W_K, W_V, W_O and their biases (b_O belongs to no head)."""
    return [
        Site(
            f"L{layer}H{head}", _of_head(model, layer, head, "QKVO"), coords_of("heads", "head", layer, head)
        )
        for layer, head in _heads(model)
    ]


def circuits(model: nn.Module) -> list[Site]:
    """Two sites per head: QK, which decides where it attends, and OV, what it moves (Elhage et al. 2021)."""
    return [
        Site(
            f"{name} L{layer}H{head}",
            _of_head(model, layer, head, parts),
            coords_of("circuits", name, layer, head),
        )
        for name, parts in (("QK", "QK"), ("OV", "VO"))
        for layer, head in _heads(model)
    ]


def matrices(model: nn.Module) -> list[Site]:
    """A partition of all parameters into matrices, each with its bias.

    W_E, W_pos, per head W_Q, W_K, W_V and W_O, per block b_O, W_in, W_out and norms, final norm, W_U.
    """
    sites = [
        Site(name, _whole(model, prefix), coords_of("matrices", name))
        for name, prefix in (("W_E", "embed."), ("W_pos", "pos_embed."))
    ]
    every_head = _heads(model)
    for layer in range(_n_layers(model)):
        block = f"blocks.{layer}."
        sites += [
            Site(
                f"W_{part} L{layer}H{head}",
                _of_head(model, layer, head, part),
                coords_of("matrices", f"W_{part}", layer, head),
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
            sites.append(Site(f"{name} {layer}", covers, coords_of("matrices", name, layer)))
    sites += [
        Site(name, _whole(model, prefix), coords_of("matrices", name))
        for name, prefix in (("ln_final.w,b", "ln_final."), ("W_U", "unembed."))
    ]
    return [site for site in sites if site.covers]


def up_to_layer(model: nn.Module) -> list[Site]:
    """The seed's cumulative order: the embeddings, then with block 0, with block 1, ..., then all."""
    covers = _whole(model, "embed.", "pos_embed.")
    sites = [Site("embeddings", dict(covers), coords_of("up_to_layer", "embeddings"))]
    for layer in range(_n_layers(model)):
        covers |= _whole(model, f"blocks.{layer}.")
        sites.append(Site(f"+ block {layer}", dict(covers), coords_of("up_to_layer", "up to block", layer)))
    names = [name for name, _ in model.named_parameters()]
    return [
        *sites,
        Site("+ unembedding", dict.fromkeys(names, ...), coords_of("up_to_layer", "up to unembedding")),
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


def _n_layers(model: nn.Module) -> int:
    n = 1 + max((layer_of(name) for name, _ in model.named_parameters()), default=-1)
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
