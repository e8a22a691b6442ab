"""The account of a stretch of training the slow way: a bare loop, AdamW written out, a dense trapezoid.

Shares no code with the library: it knows a model, a loss and the formulas of Loshchilov & Hutter (2019).
"""

import copy

import torch
from torch import nn


def account_by_loop(
    model,
    loss,
    batches,
    measure,
    probe,
    sources,
    lr=0.01,
    betas=(0.9, 0.999),
    eps=1e-8,
    decay=0.01,
    max_norm=None,
    nodes=64,
):
    """A[step][source][name] of AdamW from its first step, and the measure after every step.

    Args:
        model: trained on a copy.
        batches: tuples of tensors with one row axis.
        sources: for each batch, {label: rows}.
        nodes: intervals of the trapezoid along every step.
    """
    model = copy.deepcopy(model)
    named = dict(model.named_parameters())
    zeros = {n: torch.zeros_like(p) for n, p in named.items()}
    second = {n: z.clone() for n, z in zeros.items()}
    first, accounts = {}, []
    values = [measured(model, measure, probe)]
    for t, (batch, rows) in enumerate(zip(batches, sources, strict=True), start=1):
        n_rows = len(batch[0])
        by_source = {}
        for label, some in rows.items():
            part = loss(model, tuple(x[some] for x in batch)) * len(some) / n_rows
            by_source[label] = dict(zip(named, torch.autograd.grad(part, list(named.values())), strict=True))
        whole = {n: sum(g[n] for g in by_source.values()) for n in named}
        norm = sum(float(g.square().sum()) for g in whole.values()) ** 0.5
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        moves = {}
        for label in {**first, **by_source}:
            known = first.get(label, zeros)
            new = by_source.get(label, zeros)
            first[label] = {n: betas[0] * known[n] + (1 - betas[0]) * scale * new[n] for n in named}
        for n in named:
            second[n] = betas[1] * second[n] + (1 - betas[1]) * (scale * whole[n]) ** 2
        for label, moment in first.items():
            moves[label] = {
                n: -lr / (1 - betas[0] ** t) * moment[n] / ((second[n] / (1 - betas[1] ** t)).sqrt() + eps)
                for n in named
            }
        moves["decay"] = {n: -lr * decay * p.detach() for n, p in named.items()}
        start = {n: p.detach().clone() for n, p in named.items()}
        change = {n: sum(move[n] for move in moves.values()) for n in named}
        mean = {n: torch.zeros_like(p) for n, p in named.items()}
        for k in range(nodes + 1):
            with torch.no_grad():
                for n, p in named.items():
                    p.copy_(start[n] + k / nodes * change[n])
            grads = torch.autograd.grad(measure(model, probe).mean(), list(named.values()), allow_unused=True)
            for n, g in zip(named, grads, strict=True):
                if g is not None:
                    mean[n] += g * (0.5 if k in (0, nodes) else 1.0) / nodes
        accounts.append(
            {label: {n: float((mean[n] * move[n]).sum()) for n in named} for label, move in moves.items()}
        )
        values.append(measured(model, measure, probe))
    return accounts, values


def measured(model: nn.Module, measure, probe) -> float:
    """The measure's mean over the probe's rows."""
    with torch.no_grad():
        return float(measure(model, probe).mean())
