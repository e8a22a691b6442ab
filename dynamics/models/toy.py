"""The toy transformer: a HookedRootModule with TransformerLens's names and one parameter per head axis.

Heads are slices of a leading axis (W_Q [n_heads, d_model, d_head]), so a head's gradient is a plain
slice. TransformerLens's own tools run on it unchanged, `torch.func` is safe on it, and state dicts of
older HookedTransformer runs load by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.config import TransformerLensConfig
from transformer_lens.hook_points import HookPoint

from dynamics.config import ToyConfig
from dynamics.models.projections import Projection
from dynamics.randomness import generator

_EPS = 1e-5

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "solu": lambda x: x * x.softmax(-1),
}


def _hook() -> HookPoint:
    return HookPoint()  # type: ignore[no-untyped-call]


class Norm(nn.Module):
    """LayerNorm (centred) or RMSNorm (not centred) with gain w, and bias b for LayerNorm."""

    def __init__(self, d_model: int, centred: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model)) if centred else None
        self.hook_scale = _hook()
        self.hook_normalized = _hook()

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        if self.b is not None:
            x = x - x.mean(-1, keepdim=True)
        x = x / self.hook_scale((x.pow(2).mean(-1, keepdim=True) + _EPS).sqrt())
        x = x * self.w if self.b is None else x * self.w + self.b
        return self.hook_normalized(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal attention; every projection has its heads on the first axis."""

    mask: Tensor
    hook_q_input: HookPoint | None
    hook_k_input: HookPoint | None
    hook_v_input: HookPoint | None
    hook_result: HookPoint | None

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        heads, d_model, d_head = config.n_heads, config.d_model, config.d_head
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.empty(heads, d_model, d_head)) for _ in range(3))
        self.b_Q, self.b_K, self.b_V = (nn.Parameter(torch.zeros(heads, d_head)) for _ in range(3))
        self.W_O = nn.Parameter(torch.empty(heads, d_head, d_model))
        self.b_O = nn.Parameter(torch.zeros(d_model))
        causal = torch.ones(config.n_ctx, config.n_ctx, dtype=torch.bool).tril()
        self.register_buffer("mask", causal, persistent=False)
        self.register_load_state_dict_pre_hook(_without_old_buffers)  # type: ignore[no-untyped-call]
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = (_hook() for _ in range(4))
        self.hook_attn_scores, self.hook_pattern = _hook(), _hook()
        self.hook_q_input = self.hook_k_input = self.hook_v_input = self.hook_result = None

    def inputs(self, resid: Tensor) -> tuple[Tensor, ...]:
        """What is normalized and read: the residual stream; with hooks there, copies by q, k, v and head."""
        if self.hook_q_input is None or self.hook_k_input is None or self.hook_v_input is None:
            return (resid,)
        of_heads = resid[:, :, None].expand(-1, -1, len(self.W_Q), -1)
        return tuple(
            hook(of_heads.clone()) for hook in (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Normalized residual stream [batch, pos, d_model] -> attention output, same shape.

        Args:
            inputs: one for q, k and v together, or one for each of them, [batch, pos, head, d_model].
        """
        pos, d_head = inputs[0].shape[1], self.W_Q.shape[-1]
        q, k, v = (
            hook(_to_heads(_input_of(part, inputs), weight, bias))
            for part, hook, weight, bias in (
                ("Q", self.hook_q, self.W_Q, self.b_Q),
                ("K", self.hook_k, self.W_K, self.b_K),
                ("V", self.hook_v, self.W_V, self.b_V),
            )
        )
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(d_head)
        scores = self.hook_attn_scores(scores.masked_fill(~self.mask[:pos, :pos], -torch.inf))
        pattern = self.hook_pattern(scores.softmax(-1))
        z = self.hook_z(torch.einsum("bhqk,bkhe->bqhe", pattern, v))
        if self.hook_result is not None:
            return self.hook_result(torch.einsum("bphe,hed->bphd", z, self.W_O)).sum(2) + self.b_O  # type: ignore[no-any-return]
        return _from_heads(z, self.W_O, self.b_O)

    def projections(self) -> list[Projection]:
        """Q, K and V read the input, O the heads' outputs."""
        return [
            *(
                Projection(
                    (f"W_{part}", f"b_{part}"),
                    lambda p, *x, part=part: _to_heads(_input_of(part, x), p[f"W_{part}"], p[f"b_{part}"]),
                    writes=f"hook_{part.lower()}",
                )
                for part in "QKV"
            ),
            Projection(("W_O", "b_O"), lambda p, z: _from_heads(z, p["W_O"], p["b_O"]), reads="hook_z"),
        ]


def _input_of(part: str, inputs: tuple[Tensor, ...]) -> Tensor:
    return inputs["QKV".index(part)] if len(inputs) > 1 else inputs[0]


def _to_heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("bpd,hde->bphe" if x.ndim == 3 else "bphd,hde->bphe", x, weight) + bias


def _from_heads(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("bphe,hed->bpd", z, weight) + bias


def _without_old_buffers(
    attention: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Older HookedTransformer runs saved the causal mask and its fill value with the weights."""
    for name in ("mask", "IGNORE"):
        state_dict.pop(prefix + name, None)


class MLP(nn.Module):
    """One hidden layer."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(config.d_model, config.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(config.d_mlp))
        self.W_out = nn.Parameter(torch.empty(config.d_mlp, config.d_model))
        self.b_out = nn.Parameter(torch.zeros(config.d_model))
        self.hook_pre = _hook()
        self.hook_post = _hook()
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, d_model]."""
        post = self.hook_post(self.activation(self.hook_pre(x @ self.W_in + self.b_in)))
        return post @ self.W_out + self.b_out  # type: ignore[no-any-return]

    def projections(self) -> list[Projection]:
        """In and out of the hidden layer."""
        return [
            Projection(("W_in", "b_in"), lambda p, x: x @ p["W_in"] + p["b_in"], writes="hook_pre"),
            Projection(("W_out", "b_out"), lambda p, x: x @ p["W_out"] + p["b_out"], reads="hook_post"),
        ]


def _norm(config: ToyConfig) -> nn.Module:
    if config.normalization == "none":
        return nn.Identity()
    return Norm(config.d_model, centred=config.normalization == "LN")


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    hook_mlp_in: HookPoint | None

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.ln1 = _norm(config)
        self.attn = Attention(config)
        if not config.attn_only:
            self.ln2 = _norm(config)
            self.mlp = MLP(config)
            self.hook_resid_mid = _hook()
            self.hook_mlp_out = _hook()
        self.hook_resid_pre = _hook()
        self.hook_attn_out = _hook()
        self.hook_resid_post = _hook()
        self.hook_mlp_in = None
        self.attn_only = config.attn_only

    def forward(self, resid: Tensor) -> Tensor:
        """Residual stream [batch, pos, d_model] -> the same after this block."""
        resid = self.hook_resid_pre(resid)
        resid = resid + self.hook_attn_out(self.attn(*map(self.ln1, self.attn.inputs(resid))))
        if not self.attn_only:
            resid = self.hook_resid_mid(resid)
            read = resid if self.hook_mlp_in is None else self.hook_mlp_in(resid.clone())
            resid = resid + self.hook_mlp_out(self.mlp(self.ln2(read)))
        return self.hook_resid_post(resid)  # type: ignore[no-any-return]


class _Embed(nn.Module):
    def __init__(self, d_vocab: int, d_model: int) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(d_vocab, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.W_E)


class _PosEmbed(nn.Module):
    def __init__(self, n_ctx: int, d_model: int) -> None:
        super().__init__()
        self.W_pos = nn.Parameter(torch.empty(n_ctx, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.W_pos[: tokens.shape[1]].repeat(len(tokens), 1, 1)  # a copy: hooks may write into it


class _Unembed(nn.Module):
    def __init__(self, d_model: int, d_vocab: int) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.empty(d_model, d_vocab))
        self.b_U = nn.Parameter(torch.zeros(d_vocab))

    def forward(self, resid: Tensor) -> Tensor:
        return resid @ self.W_U + self.b_U


def _switch(module: nn.Module, name: str, on: bool) -> None:
    """Give a module a hook point or take it away; one that is there stays, with what hooks it has."""
    if on != (getattr(module, name) is not None):
        setattr(module, name, _hook() if on else None)


class ToyTransformer(HookedRootModule):
    """Decoder-only transformer with learned positions: tokens [batch, pos] -> logits [batch, pos, vocab].

    TransformerLens's switches `set_use_split_qkv_input`, `set_use_attn_result` and `set_use_hook_mlp_in` add hook
    points where single paths can be exchanged; then logits may differ in their last bits. They start off.

    Args:
        config: shapes and options; `config.seed` (0 if None) draws the weights.
        d_vocab: number of tokens.

    Raises:
        ValueError: a sequence is longer than `config.n_ctx`.
    """

    def __init__(self, config: ToyConfig, d_vocab: int) -> None:
        super().__init__()
        self.config = config
        self.embed = _Embed(d_vocab, config.d_model)
        self.pos_embed = _PosEmbed(config.n_ctx, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_final = _norm(config)
        self.unembed = _Unembed(config.d_model, d_vocab)
        self.hook_embed = _hook()
        self.hook_pos_embed = _hook()
        self.cfg = lens_config(config, d_vocab)
        self._draw_weights(config.seed or 0)
        self.to(getattr(torch, config.dtype))
        self.setup()  # type: ignore[no-untyped-call]

    def _draw_weights(self, seed: int) -> None:
        """Weights from N(0, 0.8² / d_model), one stream each; gains one and biases zero stay as made."""
        std = 0.8 / math.sqrt(self.config.d_model)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.rpartition(".")[2].startswith("W_"):
                    draw = generator(seed, f"weights {name}").standard_normal(parameter.shape)
                    parameter.copy_(torch.from_numpy(draw * std))

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-1] > self.config.n_ctx:
            raise ValueError(f"{tokens.shape[-1]} tokens, but the model's context holds {self.config.n_ctx}.")
        resid = self.hook_embed(self.embed(tokens)) + self.hook_pos_embed(self.pos_embed(tokens))
        for block in self.blocks:
            resid = block(resid)
        return self.unembed(self.ln_final(resid))  # type: ignore[no-any-return]

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether each head reads its own copies: blocks.*.attn.hook_{q,k,v}_input [batch, pos, head, d_model]."""
        for block in self._blocks():
            for part in "qkv":
                _switch(block.attn, f"hook_{part}_input", use_split_qkv_input)
        self._switched("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether what each head writes is there apart: blocks.*.attn.hook_result [batch, pos, head, d_model]."""
        for block in self._blocks():
            _switch(block.attn, "hook_result", use_attn_result)
        self._switched("use_attn_result", use_attn_result)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether the MLP reads its own copy: blocks.*.hook_mlp_in [batch, pos, d_model]."""
        for block in self._blocks():
            _switch(block, "hook_mlp_in", use_hook_mlp_in and not self.config.attn_only)
        self._switched("use_hook_mlp_in", use_hook_mlp_in)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _switched(self, name: str, on: bool) -> None:
        setattr(self.cfg, name, on)
        self.setup()  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ToyTransformer:
        """Every way of moving or converting a module ends here; the config that TransformerLens reads follows."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.cfg.device, self.cfg.dtype = str(self.embed.W_E.device), self.embed.W_E.dtype
        return self


def lens_config(config: ToyConfig, d_vocab: int) -> TransformerLensConfig:
    """The same shapes as a config that TransformerLens's tools read."""
    lens = TransformerLensConfig(
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        d_model=config.d_model,
        d_head=config.d_head,
        d_mlp=config.d_mlp,
        n_ctx=config.n_ctx,
        d_vocab=d_vocab,
        act_fn=config.activation,
        attn_only=config.attn_only,
        normalization_type=None if config.normalization == "none" else config.normalization,
        dtype=getattr(torch, config.dtype),
        device="cpu",
    )
    lens.use_hook_mlp_in = False  # type: ignore[attr-defined]  # a bridge's config has it, and the tools of edges read it
    return lens
