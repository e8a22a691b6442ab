"""Families of transformers: what each calls its parameters, and where in them the heads lie; one table each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynamics.trees import Index


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
    def axes(self) -> list[str]:
        """["d_model", "(n_parts n_heads d_head)"]."""
        return re.findall(r"\(.*?\)|\S+", self.shape)

    @property
    def heads(self) -> str:
        """What its heads are counted by: "n_heads", or "n_kv_heads" where several queries share one."""
        return "n_kv_heads" if "n_kv_heads" in self.shape else "n_heads"


@dataclass(frozen=True)
class Family:
    """What models of one kind call their parameters. A name stands for all that begin with it.

    Attributes:
        name: as errors list it.
        body: before all names but the unembedding's, in models that have one.
        blocks: the list of blocks.
        known_by: a name within a block that tells the family from others with the same list of blocks.
        outside: the parts outside the blocks -> names.
        components: the components of a block -> names within it.
        matrices: the matrices of a block that belong to no head -> names within it.
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


_LENS = Family(
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
)
_GPT2 = Family(
    name="GPT-2",
    body="transformer.",
    blocks="h",
    known_by="attn.c_attn.",
    outside={"embed": ("wte.",), "pos_embed": ("wpe.",), "ln_final": ("ln_f.",), "unembed": ("lm_head.",)},
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
)
_NEOX = Family(
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
)
_LLAMA = Family(
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
)
FAMILIES = (_LENS, _GPT2, _NEOX, _LLAMA)


@dataclass(frozen=True)
class Attention:
    """The attention of one block: which slices of which parameters a head is.

    Attributes:
        tensors: those that are divided into heads, by the parameter's full name.
        sizes: of what their shapes are written in.
    """

    tensors: Mapping[str, AttentionTensor]
    sizes: Mapping[str, int]

    def n_heads(self, part: str) -> int:
        """How many heads there are of Q, K, V or O: of K and V fewer, where queries share them."""
        return next(self.sizes[tensor.heads] for tensor in self.tensors.values() if part in tensor.parts)

    def of_head(self, head: int, parts: str) -> dict[str, Index]:
        """What a query head uses of Q, K, V, O: {parameter: index}."""
        return {
            name: self._index(tensor, head, [i for i, part in enumerate(tensor.parts) if part in parts])
            for name, tensor in self.tensors.items()
            if set(tensor.parts) & set(parts)
        }

    def _index(self, tensor: AttentionTensor, head: int, parts: list[int]) -> Index:
        axis = next(i for i, axis in enumerate(tensor.axes) if tensor.heads in axis)
        inner = words(tensor.axes[axis])
        before = (slice(None),) * axis
        own = head // (self.sizes["n_heads"] // self.sizes[tensor.heads])
        if len(inner) == 1:
            return (*before, own)
        wanted: dict[str, int | list[int]] = {tensor.heads: own, "n_parts": parts}
        shape = [{**self.sizes, "n_parts": len(tensor.parts)}[word] for word in inner]
        places = torch.arange(math.prod(shape), device="cpu").reshape(shape)
        return (*before, _sliced(places[tuple(wanted.get(word, slice(None)) for word in inner)].flatten()))


_IN_A_BLOCK = re.compile("|".join(rf"(?:{re.escape(f.body)})?{f.blocks}\.(\d+)\." for f in FAMILIES))


def layer_of(name: str) -> int:
    """The block that a parameter of that name lies in, in any family; −1 for none."""
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
    """A label that says what else it is: "embed (tied: unembed)"; without others, the label itself."""
    said = ", ".join(dict.fromkeys(others))
    return f"{label} (tied: {said})" if said else label


def words(axis: str) -> list[str]:
    """What runs along an axis: ["n_parts", "n_heads", "d_head"]."""
    return axis.strip("()").split()


def _sliced(places: Tensor) -> slice | Tensor:
    """Places on an axis, as a slice where they lie side by side."""
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places
