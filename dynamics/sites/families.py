"""Families of transformers: what each calls its parameters, and where in them the heads lie; one table each.

TransformerLens's architecture adapters hold the same layouts as code that builds new modules from a copy of the
model; which slice of the user's own tensor a head is has to be known here. A test holds both to the same numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
            runs over `parts`: "d_model (n_parts n_heads d_head)" is [d_model, 3 · n_heads · d_head]. Parts of
            different length that follow each other are divided by "|".
    """

    name: str
    parts: str
    shape: str

    @property
    def axes(self) -> list[str]:
        """["d_model", "(n_parts n_heads d_head)"]."""
        return re.findall(r"\(.*?\)|\S+", self.shape)

    @property
    def axis(self) -> int:
        """The number of the axis along which its heads lie."""
        return next(i for i, axis in enumerate(self.axes) if "heads" in axis)

    def heads(self, part: str) -> str:
        """What the heads of a part are counted by: "n_heads", or "n_kv_heads" where several queries share one."""
        pieces = segments(self.axes[self.axis])
        piece = pieces[self.parts.index(part)] if len(pieces) > 1 else pieces[0]
        return "n_kv_heads" if "n_kv_heads" in piece else "n_heads"


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
        config: what the model's config must say besides, for models of the same names with other layouts.
    """

    name: str
    body: str
    blocks: str
    known_by: str
    outside: Mapping[str, tuple[str, ...]]
    components: Mapping[str, tuple[str, ...]]
    matrices: Mapping[str, tuple[str, ...]]
    attention: tuple[AttentionTensor, ...]
    config: Mapping[str, object] = field(default_factory=dict)


def _separate(
    start: str, output: str, names: Sequence[str] = ("q_proj", "k_proj", "v_proj")
) -> tuple[AttentionTensor, ...]:
    """The tensors of an attention with a linear layer for each of Q, K and V, whose biases may be absent."""
    heads = {"Q": "n_heads", "K": "n_kv_heads", "V": "n_kv_heads"}
    return (
        *(
            AttentionTensor(f"{start}{name}.weight", part, f"({heads[part]} d_head) d_model")
            for name, part in zip(names, "QKV", strict=True)
        ),
        AttentionTensor(f"{output}.weight", "O", "d_model (n_heads d_head)"),
        *(
            AttentionTensor(f"{start}{name}.bias", part, f"({heads[part]} d_head)")
            for name, part in zip(names, "QKV", strict=True)
        ),
    )


def _fused(name: str, output: str, rows: str) -> tuple[AttentionTensor, ...]:
    """The tensors of an attention whose Q, K and V are one linear layer of these rows."""
    return (
        AttentionTensor(f"{output}.weight", "O", "d_model (n_heads d_head)"),
        AttentionTensor(f"{name}.weight", "QKV", f"{rows} d_model"),
        AttentionTensor(f"{name}.bias", "QKV", rows),
    )


_IN_TURN = "(n_heads n_parts d_head)"
_ONE_AFTER_ANOTHER = "(n_heads d_head | n_kv_heads d_head | n_kv_heads d_head)"

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
    attention=_fused("attention.query_key_value", "attention.dense", _IN_TURN),
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
    attention=_separate("self_attn.", "self_attn.o_proj"),
)
_PHI3 = replace(
    _LLAMA,
    name="Phi-3",
    known_by="self_attn.qkv_proj.",
    matrices={
        "b_O": ("self_attn.o_proj.bias",),
        "W_gate,in": ("mlp.gate_up_proj.",),
        "W_out": ("mlp.down_proj.",),
        "ln1.w,b": ("input_layernorm.",),
        "ln2.w,b": ("post_attention_layernorm.",),
    },
    attention=_fused("self_attn.qkv_proj", "self_attn.o_proj", _ONE_AFTER_ANOTHER),
)
_PHI = replace(
    _LLAMA,
    name="Phi",
    known_by="self_attn.dense.",
    outside={"embed": ("embed_tokens.",), "ln_final": ("final_layernorm.",), "unembed": ("lm_head.",)},
    components={"attn": ("self_attn.",), "mlp": ("mlp.",), "ln": ("input_layernorm.",)},
    matrices={
        "b_O": ("self_attn.dense.bias",),
        "W_in": ("mlp.fc1.",),
        "W_out": ("mlp.fc2.",),
        "ln1.w,b": ("input_layernorm.",),
    },
    attention=_separate("self_attn.", "self_attn.dense"),
)
_OPT = Family(
    name="OPT",
    body="model.decoder.",
    blocks="layers",
    known_by="self_attn_layer_norm.",
    outside={
        "embed": ("embed_tokens.", "project_in."),
        "pos_embed": ("embed_positions.",),
        "ln_final": ("final_layer_norm.",),
        "unembed": ("lm_head.", "project_out."),
    },
    components={
        "attn": ("self_attn.",),
        "mlp": ("fc1.", "fc2."),
        "ln": ("self_attn_layer_norm.", "final_layer_norm."),
    },
    matrices={
        "b_O": ("self_attn.out_proj.bias",),
        "W_in": ("fc1.",),
        "W_out": ("fc2.",),
        "ln1.w,b": ("self_attn_layer_norm.",),
        "ln2.w,b": ("final_layer_norm.",),
    },
    attention=_separate("self_attn.", "self_attn.out_proj"),
)
_GPT_NEO = replace(
    _GPT2,
    name="GPT-Neo",
    known_by="attn.attention.",
    matrices={**_GPT2.matrices, "b_O": ("attn.attention.out_proj.bias",)},
    attention=_separate("attn.attention.", "attn.attention.out_proj"),
)
_GPT_J = replace(
    _GPT2,
    name="GPT-J",
    known_by="attn.out_proj.",
    components={**_GPT2.components, "ln": ("ln_1.",)},
    matrices={"W_in": ("mlp.fc_in.",), "W_out": ("mlp.fc_out.",), "ln1.w,b": ("ln_1.",)},
    attention=_separate("attn.", "attn.out_proj"),
)
_BIG_CODE = replace(
    _GPT2,
    name="GPT-BigCode",
    attention=_fused("attn.c_attn", "attn.c_proj", _ONE_AFTER_ANOTHER),
    config={"multi_query": True},
)
_BLOOM = Family(
    name="Bloom",
    body="transformer.",
    blocks="h",
    known_by="self_attention.query_key_value.",
    outside={
        "embed": ("word_embeddings.", "word_embeddings_layernorm."),
        "ln_final": ("ln_f.",),
        "unembed": ("lm_head.",),
    },
    components={**_NEOX.components, "attn": ("self_attention.",)},
    matrices={**_NEOX.matrices, "b_O": ("self_attention.dense.bias",)},
    attention=_fused("self_attention.query_key_value", "self_attention.dense", _IN_TURN),
)
_FALCON = replace(
    _BLOOM,
    name="Falcon",
    attention=_fused("self_attention.query_key_value", "self_attention.dense", _ONE_AFTER_ANOTHER),
    config={"multi_query": True, "new_decoder_architecture": False},
)
_BERT = Family(
    name="BERT",
    body="bert.",
    blocks="encoder.layer",
    known_by="attention.self.query.",
    outside={
        "embed": (
            "embeddings.word_embeddings.",
            "embeddings.token_type_embeddings.",
            "embeddings.LayerNorm.",
        ),
        "pos_embed": ("embeddings.position_embeddings.",),
        "unembed": ("cls.",),
    },
    components={
        "attn": ("attention.self.", "attention.output.dense."),
        "mlp": ("intermediate.", "output.dense."),
        "ln": ("attention.output.LayerNorm.", "output.LayerNorm."),
    },
    matrices={
        "b_O": ("attention.output.dense.bias",),
        "W_in": ("intermediate.dense.",),
        "W_out": ("output.dense.",),
        "ln1.w,b": ("attention.output.LayerNorm.",),
        "ln2.w,b": ("output.LayerNorm.",),
    },
    attention=_separate("attention.self.", "attention.output.dense", ("query", "key", "value")),
)
FAMILIES = (
    *(_LENS, _BIG_CODE, _GPT2, _GPT_NEO, _GPT_J, _FALCON, _BLOOM, _NEOX),
    *(_PHI3, _PHI, _LLAMA, _OPT, _BERT),
)
"""The first that fits is a model's."""


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
        return next(
            self.sizes[tensor.heads(part)] for tensor in self.tensors.values() if part in tensor.parts
        )

    def of_head(self, head: int, parts: str) -> dict[str, Index]:
        """What a query head uses of Q, K, V, O: {parameter: index}."""
        return {
            name: self._index(tensor, head, [part for part in tensor.parts if part in parts])
            for name, tensor in self.tensors.items()
            if set(tensor.parts) & set(parts)
        }

    def _index(self, tensor: AttentionTensor, head: int, parts: list[str]) -> Index:
        before = (slice(None),) * tensor.axis
        pieces = segments(tensor.axes[tensor.axis])
        own = {p: head // (self.sizes["n_heads"] // self.sizes[tensor.heads(p)]) for p in parts}
        if pieces == [["n_heads"]]:
            return (*before, own[parts[0]])
        sizes = {**self.sizes, "n_parts": len(tensor.parts)}
        shapes = [[sizes[word] for word in piece] for piece in pieces]
        lengths = [math.prod(shape) for shape in shapes]
        spans = torch.split(torch.arange(sum(lengths), device="cpu"), lengths)
        found = []
        for part in parts:
            place = tensor.parts.index(part)
            number = place if len(pieces) > 1 else 0
            wanted = {tensor.heads(part): own[part], "n_parts": place}
            at = tuple(wanted.get(word, slice(None)) for word in pieces[number])
            found.append(spans[number].reshape(shapes[number])[at].flatten())
        return (*before, _sliced(torch.cat(found)))


_IN_A_BLOCK = re.compile("|".join(rf"(?:{re.escape(f.body)})?{f.blocks}\.(\d+)\." for f in FAMILIES))


def unadapted(name: str) -> str:
    """The name that a parameter has in a model without peft's adapters around it: seen through a PeftModel."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def layer_of(name: str) -> int:
    """The block that a parameter of that name lies in, in any family; −1 for none."""
    found = _IN_A_BLOCK.match(unadapted(name))
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


def segments(axis: str) -> list[list[str]]:
    """What runs along an axis, piece by piece: [["n_parts", "n_heads", "d_head"]]."""
    return [piece.split() for piece in axis.strip("()").split("|")]


def _sliced(places: Tensor) -> slice | Tensor:
    """Places on an axis, as a slice where they lie side by side."""
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places
