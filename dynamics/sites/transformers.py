"""Sites of transformers: layers, components, heads, circuits, matrices.

What a family calls its parameters is in its table; see `families`. Where parameters are tied, the tensor is one
site under its first name, and the label says what else it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dynamics.site_coordinates import NESTED
from dynamics.sites.families import (
    FAMILIES,
    Attention,
    AttentionTensor,
    Family,
    layer_of,
    other_names,
    segments,
    tied,
    unadapted,
)
from dynamics.sites.site import Site, SiteError, coords_of, listed
from dynamics.trees import Index


@listed
def layers(model: nn.Module) -> list[Site]:
    """One site per block: everything in it."""
    known = transformer(model)
    return [
        _site(known, f"block {layer}", known.whole(known.block(layer)), "layers", "block", layer)
        for layer in range(known.n_layers)
    ]


@listed
def components(model: nn.Module) -> list[Site]:
    """A partition of all parameters: embeddings, per block attn / mlp / ln, final norm, unembedding.

    What the family's table does not name is a site of its own, under its own name.
    """
    known = transformer(model)
    sites = [_outside(known, "components", part, part) for part in ("embed", "pos_embed")]
    for layer in range(known.n_layers):
        sites += _in_block(known, "components", layer, known.family.components)
    sites += [_outside(known, "components", part, part) for part in ("ln_final", "unembed")]
    return _partition(known, "components", sites)


@listed
def heads(model: nn.Module) -> list[Site]:
    """One site per attention head: its W_Q, W_K, W_V, W_O and their biases (b_O belongs to no head).

    Where queries share keys and values, a site has those of its group, and the sites of a group overlap.
    """
    known = transformer(model)
    return [
        _site(known, f"L{layer}H{head}", attention.of_head(head, "QKVO"), "heads", "head", layer, head)
        for layer, attention in _attentions(known)
        for head in range(attention.n_heads("Q"))
    ]


@listed
def circuits(model: nn.Module) -> list[Site]:
    """Two sites per head: QK, which decides where it attends, and OV, what it moves (Elhage et al. 2021).

    Where queries share keys and values, the sites of a group overlap, as in `heads`.
    """
    known = transformer(model)
    attentions = _attentions(known)
    return [
        _site(known, f"{name} L{layer}H{head}", attention.of_head(head, parts), "circuits", name, layer, head)
        for name, parts in (("QK", "QK"), ("OV", "VO"))
        for layer, attention in attentions
        for head in range(attention.n_heads("Q"))
    ]


_MATRICES = {"embed": "W_E", "pos_embed": "W_pos", "ln_final": "ln_final.w,b", "unembed": "W_U"}
"""The matrices outside the blocks, by the component they are."""


@listed
def matrices(model: nn.Module) -> list[Site]:
    """A partition of all parameters into matrices, each with its bias.

    W_E, W_pos, per head W_Q, W_K, W_V and W_O, per block b_O, W_in (and W_gate), W_out and norms, final norm,
    W_U. Keys and values that several queries share are counted by themselves: "W_K L0KV1" is the second of
    its block, and so is its coordinate `head`. What the family's table does not name is a site of its own.
    """
    known = transformer(model)
    sites = [_outside(known, "matrices", part, _MATRICES[part]) for part in ("embed", "pos_embed")]
    for layer, attention in _attentions(known):
        for part in "QKVO":
            shared_by = attention.n_heads("Q") // attention.n_heads(part)
            sites += [
                _site(
                    known,
                    f"W_{part} L{layer}{'H' if shared_by == 1 else 'KV'}{head}",
                    attention.of_head(head * shared_by, part),
                    "matrices",
                    f"W_{part}",
                    layer,
                    head,
                )
                for head in range(attention.n_heads(part))
            ]
        sites += _in_block(known, "matrices", layer, known.family.matrices)
    sites += [_outside(known, "matrices", part, _MATRICES[part]) for part in ("ln_final", "unembed")]
    return _partition(known, "matrices", sites)


@listed
def up_to_layer(model: nn.Module) -> list[Site]:
    """The seed's cumulative order: the embeddings, then with block 0, with block 1, ..., then all."""
    known = transformer(model)
    outside = known.family.outside
    covers = known.whole(outside["embed"] + outside.get("pos_embed", ()))
    sites = [_site(known, "embeddings", dict(covers), NESTED, "embeddings")]
    for layer in range(known.n_layers):
        covers |= known.whole(known.block(layer))
        coords = coords_of(NESTED, "up to block", layer)
        sites.append(Site(f"+ block {layer}", known.own(covers), coords))
    everything = known.own(dict.fromkeys(known.tensors, ...))
    return [*sites, Site("+ unembedding", everything, coords_of(NESTED, "up to unembedding"))]


LEVELS = {
    "layers": layers,
    "components": components,
    "heads": heads,
    "circuits": circuits,
    "matrices": matrices,
    NESTED: up_to_layer,
}
"""The levels of detail a study goes through, coarse ones first."""


def _site(
    known: Transformer,
    label: str,
    covers: Mapping[str, Index],
    level: str,
    component: str,
    layer: int = -1,
    head: int = -1,
) -> Site:
    """A site whose label says what tied tensors it covers are besides: a part, or a parameter's other name."""
    shown = _MATRICES if level == "matrices" else {}
    others = [known.part_of(other) for name in covers for other in known.others.get(name, ())]
    label = tied(label, (shown.get(other, other) for other in others))
    return Site(label, known.own(covers), coords_of(level, component, layer, head))


def _outside(known: Transformer, level: str, part: str, label: str) -> Site:
    return _site(known, label, known.whole(known.family.outside.get(part, ())), level, label)


def _in_block(known: Transformer, level: str, layer: int, table: Mapping[str, tuple[str, ...]]) -> list[Site]:
    return [
        _site(known, f"{name} {layer}", known.whole(known.block(layer, names)), level, name, layer)
        for name, names in table.items()
    ]


def _partition(known: Transformer, level: str, sites: list[Site]) -> list[Site]:
    """The sites that cover something, and one for each parameter that none of them covers."""
    covered = {name for site in sites for name in site.covers}
    rest = [(name, own) for name, own in known.names.items() if own not in covered]
    return [site for site in sites if site.covers] + [
        _site(known, own, {name: ...}, level, own, layer_of(own)) for name, own in rest
    ]


def _attentions(known: Transformer) -> list[tuple[int, Attention]]:
    return [(layer, known.attention(layer)) for layer in range(known.n_layers)]


# --- a model read by its family's table -------------------------------------------------------------------

_CONFIG = (
    ("n_heads", "num_attention_heads"),
    ("n_heads", "n_head"),
    ("n_kv_heads", "num_key_value_heads"),
    ("d_head", "head_dim"),
)
"""What a model's config calls the sizes that shapes of fused tensors do not tell."""


@dataclass(frozen=True)
class Transformer:
    """A model whose parameters are named as in a known family.

    Attributes:
        model: the model.
        family: the table its names are read by.
        body: the family's, or nothing in a model without its language-model head.
        tensors: its parameters by name, tied ones by their first; as they are without adapters.
        others: the further names of tied ones.
        names: those names -> the model's own, which differ within a PeftModel.
    """

    model: nn.Module
    family: Family
    body: str
    tensors: Mapping[str, Tensor]
    others: Mapping[str, list[str]]
    names: Mapping[str, str]

    def own(self, covers: Mapping[str, Index]) -> dict[str, Index]:
        """What is covered, under the model's own names."""
        return {self.names[name]: index for name, index in covers.items()}

    @property
    def n_layers(self) -> int:
        return 1 + max(layer_of(name) for name in self.tensors)

    def block(self, layer: int, names: Iterable[str] = ("",)) -> tuple[str, ...]:
        """Names within a block, as `whole` takes them; without names, the block's own."""
        return tuple(f"{self.family.blocks}.{layer}.{name}" for name in names)

    def whole(self, names: tuple[str, ...]) -> dict[str, Index]:
        """All parameters whose names, after the body's, begin so: {parameter: `...`}."""
        return {name: ... for name in self.tensors if name.removeprefix(self.body).startswith(names)}

    def part_of(self, name: str) -> str:
        """The part outside the blocks that a name belongs to, or the name itself."""
        within = name.removeprefix(self.body)
        return next((part for part, names in self.family.outside.items() if within.startswith(names)), name)

    def attention(self, layer: int) -> Attention:
        """A block's attention.

        Raises:
            SiteError: a tensor is missing, or its shape is not the one in the family's table.
        """
        start = f"{self.body}{self.family.blocks}.{layer}."
        present = {start + t.name: t for t in self.family.attention if start + t.name in self.tensors}
        held = {part for tensor in present.values() for part in tensor.parts}
        for tensor in self.family.attention:
            if not held.issuperset(tensor.parts):
                raise self._misshapen(start + tensor.name, tensor, "there is none of that name")
        config = getattr(self.model, "config", None)
        sizes = {size: n for size, name in _CONFIG if isinstance(n := getattr(config, name, None), int)}
        for name, tensor in present.items():
            self._measure(name, tensor, sizes)
        if sizes.get("n_kv_heads", 1) < 1 or sizes["n_heads"] % sizes.get("n_kv_heads", 1):
            raise SiteError(
                f"{type(self.model).__name__} has {sizes['n_heads']} query heads and {sizes['n_kv_heads']} key and "
                "value heads, of which each should serve as many queries: see config.num_key_value_heads."
            )
        return Attention(present, sizes)

    def _measure(self, name: str, tensor: AttentionTensor, sizes: dict[str, int]) -> None:
        """Read the sizes that are not known yet off a tensor's shape, which must agree with the others."""
        shape = list(self.tensors[name].shape)
        fits = len(shape) == len(tensor.axes)
        for axis, size in zip(tensor.axes, shape, strict=False):
            known = {"n_parts": len(tensor.parts), **sizes}
            pieces = segments(axis)
            unknown = list(dict.fromkeys(word for piece in pieces for word in piece if word not in known))
            counted = [math.prod(known.get(word, 1) for word in piece) for piece in pieces]
            times = sum(n for n, piece in zip(counted, pieces, strict=True) if set(unknown) & set(piece))
            fixed = sum(counted) - times
            if len(unknown) > 1:
                raise SiteError(
                    f"{type(self.model).__name__} does not say how many heads share an axis of {name}: it has "
                    "no config.num_attention_heads. Use sites.matching(model, {label: glob})."
                )
            if unknown:
                sizes[unknown[0]] = (size - fixed) // times
            fits &= size == fixed + (times * sizes[unknown[0]] if unknown else 0)
        if not fits:
            told = ", ".join(f"{word} {size}" for word, size in sizes.items())
            raise self._misshapen(name, tensor, f"it is {shape}, with {told}")

    def _misshapen(self, name: str, tensor: AttentionTensor, found: str) -> SiteError:
        shape = ", ".join(tensor.axes).replace("n_parts", str(len(tensor.parts)))
        return SiteError(
            f"{type(self.model).__name__} has no {name} of shape [{shape}] ({found}), so its heads are not where "
            f"{self.family.name} has them. Use sites.matching(model, {{label: glob}})."
        )


def transformer(model: nn.Module) -> Transformer:
    """A model as its family's table reads it.

    Raises:
        SiteError: its names are those of no family; the families are listed.
    """
    names = {unadapted(name): name for name, _ in model.named_parameters()}
    tensors = {unadapted(name): p for name, p in model.named_parameters()}
    others = {unadapted(name): list(map(unadapted, of)) for name, of in other_names(model).items()}
    config = getattr(model, "config", None)
    for family in FAMILIES:
        if any(getattr(config, name, None) != value for name, value in family.config.items()):
            continue
        for body in dict.fromkeys((family.body, "")):
            begins = re.compile(rf"{re.escape(body)}{family.blocks}\.\d+\.{re.escape(family.known_by)}")
            if any(begins.match(name) for name in tensors):
                return Transformer(model, family, body, tensors, others, names)
    known = [f"{f.body}{f.blocks}.0.{f.known_by}.. as {f.name} names them" for f in FAMILIES]
    raise SiteError(
        f"{type(model).__name__} has no parameters named {', '.join(known[:-1])} or {known[-1]}. "
        "Use sites.parameters(model) or sites.matching(model, {label: glob})."
    )
