"""Families of transformers: what each calls its parameters, and where in them the heads lie; one table each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynamics.sites.site import SiteError
from dynamics.trees import Index

# --- the tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionTensor:
    """A parameter of the attention with an axis along which its heads lie.

    Attributes:
        name: within its block.
        parts: which of Q, K, V, O it holds, in their order.
        shape: its axes; those that share one stand in parentheses, the slowest first, and there `n_parts`
            runs over `parts`: "d_model (n_parts n_heads d_head)" is [d_model, 3 · n_heads · d_head].
    """

    name: str
    parts: str
    shape: str

    @property
    def axes(self) -> list[list[str]]:
        """What runs along each axis: [["d_model"], ["n_parts", "n_heads", "d_head"]]."""
        return [axis.strip("()").split() for axis in re.findall(r"\(.*?\)|\S+", self.shape)]

    @property
    def heads(self) -> str:
        """What its heads are counted by: "n_heads", or "n_kv_heads" where several queries share one."""
        return next(word for axis in self.axes for word in axis if word in ("n_heads", "n_kv_heads"))


@dataclass(frozen=True)
class Family:
    """What models of one kind call their parameters. Names are prefixes, so that a bias goes with its weight.

    Attributes:
        name: as errors list it.
        body: before all names but the unembedding's, in models that have one.
        blocks: name of the list of blocks.
        known_by: a name within a block that tells the family from others with the same list of blocks.
        outside: the parts outside the blocks -> names.
        components: the components within a block -> names.
        matrices: the matrices within a block that belong to no head -> names.
        attention: the tensors that are divided into heads.
    """

    name: str
    body: str
    blocks: str
    known_by: str
    outside: Mapping[str, tuple[str, ...]]
    components: Mapping[str, tuple[str, ...]]
    matrices: Mapping[str, tuple[str, ...]]
    attention: tuple[AttentionTensor, ...]


FAMILIES = (
    Family(
        name="TransformerLens",
        body="",
        blocks="blocks",
        known_by="",
        outside={
            "embed": ("embed.",),
            "pos_embed": ("pos_embed.",),
            "ln_final": ("ln_final.",),
            "unembed": ("unembed.",),
        },
        components={"attn": ("attn.",), "mlp": ("mlp.",), "ln": ("ln1.", "ln2.")},
        matrices={
            "b_O": ("attn.b_O",),
            "W_in": ("mlp.W_in", "mlp.b_in"),
            "W_out": ("mlp.W_out", "mlp.b_out"),
            "ln1.w,b": ("ln1.",),
            "ln2.w,b": ("ln2.",),
        },
        attention=(
            AttentionTensor("attn.W_Q", "Q", "n_heads d_model d_head"),
            AttentionTensor("attn.W_K", "K", "n_heads d_model d_head"),
            AttentionTensor("attn.W_V", "V", "n_heads d_model d_head"),
            AttentionTensor("attn.W_O", "O", "n_heads d_head d_model"),
            AttentionTensor("attn.b_Q", "Q", "n_heads d_head"),
            AttentionTensor("attn.b_K", "K", "n_heads d_head"),
            AttentionTensor("attn.b_V", "V", "n_heads d_head"),
        ),
    ),
    Family(
        name="GPT-2",
        body="transformer.",
        blocks="h",
        known_by="attn.c_attn.",
        outside={
            "embed": ("wte.",),
            "pos_embed": ("wpe.",),
            "ln_final": ("ln_f.",),
            "unembed": ("lm_head.",),
        },
        components={"attn": ("attn.",), "mlp": ("mlp.",), "ln": ("ln_1.", "ln_2.")},
        matrices={
            "b_O": ("attn.c_proj.bias",),
            "W_in": ("mlp.c_fc.",),
            "W_out": ("mlp.c_proj.",),
            "ln1.w,b": ("ln_1.",),
            "ln2.w,b": ("ln_2.",),
        },
        attention=(
            AttentionTensor("attn.c_attn.weight", "QKV", "d_model (n_parts n_heads d_head)"),
            AttentionTensor("attn.c_attn.bias", "QKV", "(n_parts n_heads d_head)"),
            AttentionTensor("attn.c_proj.weight", "O", "(n_heads d_head) d_model"),
        ),
    ),
    Family(
        name="GPT-NeoX",
        body="gpt_neox.",
        blocks="layers",
        known_by="attention.query_key_value.",
        outside={
            "embed": ("embed_in.",),
            "ln_final": ("final_layer_norm.",),
            "unembed": ("lm_head.", "embed_out."),  # the second before transformers 5
        },
        components={
            "attn": ("attention.",),
            "mlp": ("mlp.",),
            "ln": ("input_layernorm.", "post_attention_layernorm."),
        },
        matrices={
            "b_O": ("attention.dense.bias",),
            "W_in": ("mlp.dense_h_to_4h.",),
            "W_out": ("mlp.dense_4h_to_h.",),
            "ln1.w,b": ("input_layernorm.",),
            "ln2.w,b": ("post_attention_layernorm.",),
        },
        attention=(
            AttentionTensor("attention.query_key_value.weight", "QKV", "(n_heads n_parts d_head) d_model"),
            AttentionTensor("attention.query_key_value.bias", "QKV", "(n_heads n_parts d_head)"),
            AttentionTensor("attention.dense.weight", "O", "d_model (n_heads d_head)"),
        ),
    ),
    Family(
        name="Llama",
        body="model.",
        blocks="layers",
        known_by="self_attn.o_proj.",
        outside={"embed": ("embed_tokens.",), "ln_final": ("norm.",), "unembed": ("lm_head.",)},
        components={
            "attn": ("self_attn.",),
            "mlp": ("mlp.",),
            "ln": ("input_layernorm.", "post_attention_layernorm."),
        },
        matrices={
            "b_O": ("self_attn.o_proj.bias",),
            "W_gate": ("mlp.gate_proj.",),
            "W_in": ("mlp.up_proj.",),
            "W_out": ("mlp.down_proj.",),
            "ln1.w,b": ("input_layernorm.",),
            "ln2.w,b": ("post_attention_layernorm.",),
        },
        attention=(
            AttentionTensor("self_attn.q_proj.weight", "Q", "(n_heads d_head) d_model"),
            AttentionTensor("self_attn.k_proj.weight", "K", "(n_kv_heads d_head) d_model"),
            AttentionTensor("self_attn.v_proj.weight", "V", "(n_kv_heads d_head) d_model"),
            AttentionTensor("self_attn.o_proj.weight", "O", "d_model (n_heads d_head)"),
            AttentionTensor("self_attn.q_proj.bias", "Q", "(n_heads d_head)"),
            AttentionTensor("self_attn.k_proj.bias", "K", "(n_kv_heads d_head)"),
            AttentionTensor("self_attn.v_proj.bias", "V", "(n_kv_heads d_head)"),
        ),
    ),
)

# --- a model read by its table ----------------------------------------------------------------------------

_CONFIG = {
    "n_heads": ("num_attention_heads", "n_head"),
    "n_kv_heads": ("num_key_value_heads",),
    "d_head": ("head_dim",),
}
"""What a model's config calls sizes that the shapes of fused tensors do not tell."""


@dataclass(frozen=True)
class Attention:
    """The attention of one block: which slices of which parameters a head is.

    Attributes:
        tensors: its parameters by full name, as the family's table describes them.
        sizes: `n_heads`, `n_kv_heads` where it is told, `d_head`.
    """

    tensors: Mapping[str, AttentionTensor]
    sizes: Mapping[str, int]

    def n_heads(self, part: str = "Q") -> int:
        """How many heads Q, K, V or O has: of K and V fewer, where queries share them."""
        return next(self.sizes[tensor.heads] for tensor in self.tensors.values() if part in tensor.parts)

    def of_head(self, head: int, parts: str) -> dict[str, Index]:
        """Those of its Q, K, V, O that a query head uses: {parameter: index}."""
        return {
            name: self._index(tensor, head, parts)
            for name, tensor in self.tensors.items()
            if set(tensor.parts) & set(parts)
        }

    def _index(self, tensor: AttentionTensor, head: int, parts: str) -> Index:
        axis, words = next((i, words) for i, words in enumerate(tensor.axes) if tensor.heads in words)
        before = (slice(None),) * axis
        own = head // (self.sizes["n_heads"] // self.sizes[tensor.heads])
        if len(words) == 1:
            return (*before, own)
        places = [
            sum(
                {"n_parts": place, tensor.heads: own}[word] * math.prod(self._sizes(tensor, words[i + 1 :]))
                for i, word in enumerate(words[:-1])
            )
            for place, part in enumerate(tensor.parts)
            if part in parts
        ]
        return (*before, _stretches(places, self.sizes["d_head"]))

    def _sizes(self, tensor: AttentionTensor, words: Iterable[str]) -> list[int]:
        return [len(tensor.parts) if word == "n_parts" else self.sizes[word] for word in words]


@dataclass(frozen=True)
class Transformer:
    """A model whose parameters are named as in a known family.

    Attributes:
        model: its class, for errors.
        config: what says how many heads it has, where the shapes do not.
        family: the table its names are read by.
        body: the family's, or nothing for a model without its language-model head.
        tensors: its parameters by name, tied ones by their first.
        others: the other names of tied parameters.
    """

    model: str
    config: object
    family: Family
    body: str
    tensors: Mapping[str, Tensor]
    others: Mapping[str, list[str]]

    @property
    def n_layers(self) -> int:
        return 1 + max(layer_of(name) for name in self.tensors)

    def within(self, layer: int, *names: str) -> tuple[str, ...]:
        """Names within a block as names within the model."""
        return tuple(f"{self.family.blocks}.{layer}.{name}" for name in names)

    def whole(self, *prefixes: str) -> dict[str, Index]:
        """All parameters whose names begin so, after the body's: {parameter: `...`}."""
        return {name: ... for name in self.tensors if self._begins(name, prefixes)}

    def ties(self, covers: Iterable[str]) -> list[str]:
        """What else the covered parameters are: a part outside the blocks, or the other name itself."""
        return [
            next((part for part, names in self.family.outside.items() if self._begins(other, names)), other)
            for name in covers
            for other in self.others.get(name, [])
        ]

    def attention(self, layer: int) -> Attention:
        """A block's attention.

        Raises:
            SiteError: a tensor is missing or has not the shape of the family's table.
        """
        named = {f"{self.body}{self.within(layer, t.name)[0]}": t for t in self.family.attention}
        present = {name: tensor for name, tensor in named.items() if name in self.tensors}
        for name, tensor in named.items():
            if not any(set(tensor.parts) <= set(other.parts) for other in present.values()):
                raise self._misshapen(name, tensor, "there is none of that name")
        sizes = dict(self._told_by_config())
        for name, tensor in present.items():
            self._agree(name, tensor, sizes)
        return Attention(present, sizes)

    def _begins(self, name: str, prefixes: tuple[str, ...]) -> bool:
        return name.removeprefix(self.body).startswith(prefixes)

    def _told_by_config(self) -> Iterable[tuple[str, int]]:
        for size, names in _CONFIG.items():
            for name in names:
                if isinstance(told := getattr(self.config, name, None), int):
                    yield size, told

    def _agree(self, name: str, tensor: AttentionTensor, sizes: dict[str, int]) -> None:
        """Find the sizes that are not known yet in a tensor's shape, and raise unless all of it fits."""
        shape = list(self.tensors[name].shape)
        fits = len(shape) == len(tensor.axes)
        for words, size in zip(tensor.axes, shape, strict=False):
            known = {"n_parts": len(tensor.parts), **sizes}
            unknown = [word for word in words if word not in known]
            times = math.prod(known[word] for word in words if word in known)
            if "n_heads" in unknown and len(words) > 1:
                raise SiteError(
                    f"{self.model} does not say how many heads share an axis of {name}: its config has neither "
                    f"{' nor '.join(_CONFIG['n_heads'])}. Use sites.matching(model, {{label: glob}})."
                )
            if len(unknown) == 1:
                sizes[unknown[0]] = size // times
            fits &= size % times == 0 if unknown else size == times
        if not fits:
            raise self._misshapen(name, tensor, f"it is {shape}, with {_written(sizes)}")

    def _misshapen(self, name: str, tensor: AttentionTensor, found: str) -> SiteError:
        axes = [" ".join(words) if len(words) == 1 else f"({' '.join(words)})" for words in tensor.axes]
        return SiteError(
            f"{self.model} has no {name} of shape [{', '.join(axes)}] ({found}), so its heads are not the slices "
            f"that {self.family.name} has. Use sites.matching(model, {{label: glob}})."
        )


def transformer(model: nn.Module) -> Transformer:
    """A model as its family's table reads it.

    Raises:
        SiteError: no family's names are found; the families are listed.
    """
    tensors = dict(model.named_parameters())
    for family in FAMILIES:
        for body in dict.fromkeys((family.body, "")):
            begins = re.compile(rf"{re.escape(body)}{family.blocks}\.\d+\.{re.escape(family.known_by)}")
            if any(begins.match(name) for name in tensors):
                config = getattr(model, "config", None)
                return Transformer(type(model).__name__, config, family, body, tensors, other_names(model))
    known = [f"{f.body}{f.blocks}.0.{f.known_by}.. as {f.name} names them" for f in FAMILIES]
    raise SiteError(
        f"{type(model).__name__} has no parameters named {', '.join(known[:-1])} or {known[-1]}. "
        "Use sites.parameters(model) or sites.matching(model, {label: glob})."
    )


_IN_A_BLOCK = re.compile("|".join(rf"(?:{re.escape(f.body)})?{f.blocks}\.(\d+)\." for f in FAMILIES))


def layer_of(name: str) -> int:
    """The block a parameter lies in, by any family's names; −1 for none."""
    found = _IN_A_BLOCK.match(name)
    return int(found[found.lastindex or 0]) if found else -1


def other_names(model: nn.Module) -> dict[str, list[str]]:
    """The further names of tied parameters, by their first: {"embed.weight": ["unembed.weight"]}."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    others: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name:
            others.setdefault(first[id(parameter)], []).append(name)
    return others


def tied(label: str, others: Iterable[str]) -> str:
    """A label that says what else it is: "embed (tied: unembed)"; without ties, the label itself."""
    said = ", ".join(dict.fromkeys(others))
    return f"{label} (tied: {said})" if said else label


def _stretches(starts: list[int], length: int) -> slice | Tensor:
    """Stretches of equal length on one axis: a slice if they lie side by side, else their places."""
    if starts == list(range(starts[0], starts[0] + length * len(starts), length)):
        return slice(starts[0], starts[0] + length * len(starts))
    return torch.cat([torch.arange(start, start + length, device="cpu") for start in starts])


def _written(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
