"""The slow, obvious transformer: numpy vectors, one Python loop each over rows, positions and heads.

Written from the equations (Elhage et al. 2021; Ba et al. 2016; Zhang and Sennrich 2019), in float64. Every
activation it passes is kept under TransformerLens's name, and may be replaced on its way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray


def softmax(x: Array) -> Array:
    weights = np.array([math.exp(value - max(x)) for value in x])
    return weights / sum(weights)


def activation(name: str, x: Array) -> Array:
    if name == "solu":
        return x * softmax(x)
    one_by_one = {
        "relu": lambda v: v if v > 0 else 0.0,
        "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
        "silu": lambda v: v / (1 + math.exp(-v)),
    }[name]
    return np.array([one_by_one(value) for value in x])


class ByLoops:
    """Logits [batch, pos, vocab] of a toy transformer's weights; `kept` holds every activation it passed.

    Args:
        model: whose config and state dict are read; none of its code is run.
        replaced: hook name -> activation of the whole batch, taken in place of the computed one.
    """

    def __init__(self, model: Any, replaced: Mapping[str, Array] | None = None) -> None:
        self.config = model.config
        self.weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
        self.replaced = replaced or {}
        self.kept: dict[str, Array] = {}

    def __call__(self, tokens: Any) -> Array:
        rows = np.asarray(tokens)
        w, n_pos = self.weights, rows.shape[1]
        embedded = self._pass("hook_embed", [[w["embed.W_E"][token] for token in row] for row in rows])
        placed = self._pass("hook_pos_embed", [[w["pos_embed.W_pos"][p] for p in range(n_pos)] for _ in rows])
        resid = embedded + placed
        for layer in range(self.config.n_layers):
            resid = self._block(f"blocks.{layer}.", resid)
        final = self._norm("ln_final.", resid)
        return np.array([[x @ w["unembed.W_U"] + w["unembed.b_U"] for x in row] for row in final])

    def _pass(self, name: str, computed: Any) -> Array:
        self.kept[name] = self.replaced.get(name, np.array(computed))
        return self.kept[name]

    def _norm(self, name: str, resid: Array) -> Array:
        kind = self.config.normalization
        if kind == "none":
            return resid
        gain, bias = self.weights[f"{name}w"], self.weights.get(f"{name}b", 0.0)
        if kind == "LN":
            resid = np.array([[x - sum(x) / len(x) for x in row] for row in resid])
        lengths = [[[math.sqrt(sum(v * v for v in x) / len(x) + 1e-5)] for x in row] for row in resid]
        scale = self._pass(f"{name}hook_scale", lengths)
        normalized = [
            [x / by * gain + bias for x, by in zip(row, row_scale, strict=True)]
            for row, row_scale in zip(resid, scale, strict=True)
        ]
        return self._pass(f"{name}hook_normalized", normalized)

    def _block(self, name: str, resid: Array) -> Array:
        resid = self._pass(f"{name}hook_resid_pre", resid)
        resid = resid + self._pass(
            f"{name}hook_attn_out", self._attention(f"{name}attn.", self._norm(f"{name}ln1.", resid))
        )
        if not self.config.attn_only:
            resid = self._pass(f"{name}hook_resid_mid", resid)
            resid = resid + self._pass(
                f"{name}hook_mlp_out", self._mlp(f"{name}mlp.", self._norm(f"{name}ln2.", resid))
            )
        return self._pass(f"{name}hook_resid_post", resid)

    def _attention(self, name: str, resid: Array) -> list[list[Array]]:
        w, heads = self.weights, range(self.config.n_heads)
        projected = {
            part: self._pass(
                f"{name}hook_{part}",
                [
                    [
                        [x @ w[f"{name}W_{part.upper()}"][h] + w[f"{name}b_{part.upper()}"][h] for h in heads]
                        for x in row
                    ]
                    for row in resid
                ],
            )
            for part in "qkv"
        }
        n_rows, n_pos = resid.shape[:2]
        scores = np.full((n_rows, len(heads), n_pos, n_pos), -np.inf)
        for b in range(n_rows):
            for h in heads:
                for reader in range(n_pos):
                    for read in range(reader + 1):
                        q, k = projected["q"][b][reader][h], projected["k"][b][read][h]
                        scores[b, h, reader, read] = q @ k / math.sqrt(self.config.d_head)
        scores = self._pass(f"{name}hook_attn_scores", scores)
        pattern = self._pass(
            f"{name}hook_pattern",
            [[[softmax(scores[b, h, p]) for p in range(n_pos)] for h in heads] for b in range(n_rows)],
        )
        z = self._pass(
            f"{name}hook_z",
            [
                [
                    [sum(pattern[b, h, p, s] * projected["v"][b, s, h] for s in range(n_pos)) for h in heads]
                    for p in range(n_pos)
                ]
                for b in range(n_rows)
            ],
        )
        return [[sum(x[h] @ w[f"{name}W_O"][h] for h in heads) + w[f"{name}b_O"] for x in row] for row in z]

    def _mlp(self, name: str, resid: Array) -> list[list[Array]]:
        w = self.weights
        pre = self._pass(
            f"{name}hook_pre", [[x @ w[f"{name}W_in"] + w[f"{name}b_in"] for x in row] for row in resid]
        )
        post = [[activation(self.config.activation, x) for x in row] for row in pre]
        post = self._pass(f"{name}hook_post", post)
        return [[x @ w[f"{name}W_out"] + w[f"{name}b_out"] for x in row] for row in post]
