"""The residual graph in numpy loops: every component reads a sum whose every term may be another run's."""

from collections.abc import Mapping

import numpy as np

Written = dict[str, np.ndarray]


class Graph:
    """A toy transformer's forward on one row of tokens, component by component.

    Args:
        model: whose config and weights are read; none of its code is run.
    """

    def __init__(self, model):
        self.config = model.config
        self.w = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}

    def __call__(self, tokens, terms: Mapping[tuple[str, str], np.ndarray] = {}):
        """Logits [pos, vocab] and what each component wrote [pos, d_model].

        Args:
            tokens: [pos].
            terms: (sender, receiver) -> what the receiver reads in place of what the sender writes, [pos, d_model].
        """
        w, config = self.w, self.config
        n_pos = len(tokens)
        constant = np.array([w["pos_embed.W_pos"][p] for p in range(n_pos)])
        written: Written = {"embed": np.array([w["embed.W_E"][token] for token in tokens])}

        def read(receiver):
            total = constant.copy()
            for sender, value in written.items():
                total = total + terms.get((sender, receiver), value)
            return total

        for layer in range(config.n_layers):
            block = f"blocks.{layer}."
            attn = block + "attn."
            before = {}
            for head in range(config.n_heads):
                label = f"L{layer}H{head}"
                q, k, v = (
                    self.norm(block + "ln1.", read(f"{label} {part}")) @ w[f"{attn}W_{part.upper()}"][head]
                    + w[f"{attn}b_{part.upper()}"][head]
                    for part in "qkv"
                )
                out = np.zeros((n_pos, config.d_model))
                for dest in range(n_pos):
                    scores = np.array([q[dest] @ k[src] for src in range(dest + 1)]) / np.sqrt(q.shape[-1])
                    weights = np.exp(scores - scores.max())
                    weights = weights / weights.sum()
                    mixed = sum(weight * v[src] for src, weight in enumerate(weights))
                    out[dest] = mixed @ w[f"{attn}W_O"][head]
                before[label] = out
            written |= before
            constant = constant + w[f"{attn}b_O"]
            if not config.attn_only:
                x = self.norm(block + "ln2.", read(f"mlp {layer}"))
                hidden = x @ w[f"{block}mlp.W_in"] + w[f"{block}mlp.b_in"]
                assert config.activation == "relu"
                written[f"mlp {layer}"] = np.maximum(hidden, 0) @ w[f"{block}mlp.W_out"]
                # its bias is the same in every run, and part of what it writes
                written[f"mlp {layer}"] = written[f"mlp {layer}"] + w[f"{block}mlp.b_out"]
        final = self.norm("ln_final.", read("logits"))
        return final @ w["unembed.W_U"] + w["unembed.b_U"], written

    def norm(self, name, x):
        if self.config.normalization == "none":
            return x
        assert self.config.normalization == "LN"
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.w[f"{name}w"] + self.w[f"{name}b"]


def patched(graph: Graph, batch, source, edges, values=None):
    """Logits at the scored position [rows, vocab] with some edges exchanged, row by row.

    Args:
        edges: (sender, receiver) pairs.
        values: sender -> [rows, pos, d_model] put in; None for what the source rows write.
    """
    found = []
    for row, tokens in enumerate(batch.tokens.tolist()):
        theirs = (
            graph(source.tokens[row].tolist())[1]
            if values is None
            else {s: v[row] for s, v in values.items()}
        )
        logits, _ = graph(tokens, {(s, r): theirs[s] for s, r in edges})
        found.append(logits[int(batch.target_pos[row])])
    return np.array(found)
