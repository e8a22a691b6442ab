"""Sites of paths: what one component of a transformer writes, as far as one other component reads it.

A residual stream is the sum of what a transformer's components write, and every component reads that sum. An edge
is one term of the sum that one component reads; exchanging it leaves all other readers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dynamics.sites.site import Site, SiteError, check_labels, coords_of, listed, some
from dynamics.trees import Index

SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
"""TransformerLens's switches, without which there is no hook where an edge can be exchanged."""

TO = " -> "

Edge = tuple[str, str]
"""Labels of a sender and a receiver: ("L0H1", "L2H3 q")."""


@dataclass(frozen=True, eq=False, repr=False)
class Path(Site):
    """One edge, or several that are exchanged together.

    Attributes:
        label: "L0H1 -> L2H3 q" of one edge.
        covers: the receivers' hooks, with all switches on.
        coords: `layer`, `head` and `component` are the receiver's (component q, k, v, mlp or logits); of one edge
            also `sender`, `sender_layer`, `sender_head`, `receiver`.
        edges: which.
    """

    edges: tuple[Edge, ...] = ()


@dataclass(frozen=True)
class End:
    """Where an edge begins or ends.

    Attributes:
        hook: the activation written or read.
        layer, head: −1 where it has none; the head's axis is the activation's third.
        component: embed, head or mlp of senders; q, k, v, mlp or logits of receivers.
        stage: senders of an earlier stage reach receivers of a later one.
    """

    hook: str
    layer: int
    head: int
    component: str
    stage: int


@listed
def paths(model: nn.Module, senders: str = "*", receivers: str = "*") -> list[Path]:
    """Every edge between components that match two globs, one site each, sender by sender.

    Senders are "embed" (the tokens'), heads "L0H1" and MLPs "mlp 0"; what else is written (positions, output
    biases) is the same in every run. Receivers are heads' inputs "L2H3 q", "L2H3 k", "L2H3 v", MLPs "mlp 2", and
    "logits", which read through the final norm. From head to head's q, k and v:
    `paths(model, "L*H*", "L*H* [qkv]")`; all there is to one receiver: `paths(model, "*", "L2H3 q")`.

    Args:
        model: a toy or a `TransformerBridge`; with TransformerLens's switches `set_use_attn_result`,
            `set_use_split_qkv_input` and `set_use_hook_mlp_in`. It is not changed.
        senders, receivers: globs of labels.

    Raises:
        SiteError: the model has no such switches, or no edge matches.

    Source: the graph of Elhage et al. 2021; as TransformerLens's `enumerate_edges`, all positions together.
    """
    begins, ends = senders_of(model), receivers_of(model)
    found = [
        path(model, sender, receiver)
        for sender, begin in begins.items()
        for receiver, end in ends.items()
        if begin.stage < end.stage and fnmatchcase(sender, senders) and fnmatchcase(receiver, receivers)
    ]
    if not found:
        raise SiteError(
            f"no path leads from {senders!r} to {receivers!r}. Senders are {some(list(begins))}; receivers "
            f"{some(list(ends))}; a sender reaches what comes after it."
        )
    return found


def path(model: nn.Module, sender: str, receiver: str) -> Path:
    """One edge, by the labels of its ends."""
    begin, end = senders_of(model)[sender], receivers_of(model)[receiver]
    coords: dict[str, str | int] = {
        **coords_of("paths", end.component, end.layer, end.head),
        "sender": sender,
        "sender_layer": begin.layer,
        "sender_head": begin.head,
        "receiver": receiver,
    }
    cut: Index = (slice(None), slice(None), end.head) if end.head >= 0 else ...
    return Path(f"{sender}{TO}{receiver}", {end.hook: cut}, coords, edges=((sender, receiver),))


def together(model: nn.Module, edges: Sequence[str], label: str) -> Path:
    """Several edges, exchanged at once.

    Args:
        edges: their labels, as of `paths`.
        label: of the site.

    Raises:
        SiteError: an edge is not there, is there twice, or there is none.
    """
    known = {site.label: site for site in paths(model)}
    unknown = [edge for edge in edges if edge not in known]
    if unknown or not edges or len(set(edges)) < len(edges):
        wrong = (
            f"{some(unknown)} is no path" if unknown else "edges must differ" if edges else "there are none"
        )
        raise SiteError(f"Site {label!r}: {wrong}. sites.paths(model) lists all {len(known)}.")
    chosen = [known[edge] for edge in edges]
    covers: dict[str, Index] = {hook: ... for site in chosen for hook in site.covers}
    return Path(
        label, covers, coords_of("paths", label), edges=tuple(e for site in chosen for e in site.edges)
    )


def outside(model: nn.Module, circuit: Sequence[str], label: str) -> Path:
    """Every edge that is not in a circuit: exchange them for a corrupted run's, and the circuit is left alone.

    Args:
        circuit: labels of edges; none leaves all edges outside.
        label: of the site.

    Raises:
        SiteError: an edge is not there, or nothing lies outside.
    """
    kept = set(circuit)
    every = [site.label for site in paths(model)]
    if unknown := sorted(kept - set(every)):
        raise SiteError(
            f"Site {label!r}: {some(unknown)} is no path. sites.paths(model) lists all {len(every)}."
        )
    return together(model, [edge for edge in every if edge not in kept], label)


def check_paths(sites: Sequence[Site], model: nn.Module) -> list[Path]:
    """The sites, which must be paths of the model with labels of their own.

    Raises:
        SiteError: one is none.
    """
    check_labels(sites)
    begins, ends = senders_of(model), receivers_of(model)
    found = []
    for site in sites:
        if not isinstance(site, Path) or not site.edges:
            raise SiteError(f"Site {site.label!r} is no path. Make such sites with sites.paths(model).")
        for sender, receiver in site.edges:
            if sender not in begins or receiver not in ends or begins[sender].stage >= ends[receiver].stage:
                raise SiteError(
                    f"Site {site.label!r}: nothing leads from {sender!r} to {receiver!r} in this model. "
                    "sites.paths(model) lists what does."
                )
        found.append(site)
    return found


def senders_of(model: nn.Module) -> dict[str, End]:
    """What writes into the residual stream, by label."""
    config = _config(model)
    found = {"embed": End("hook_embed", -1, -1, "embed", -1)}
    for layer in range(config.n_layers):
        block = f"blocks.{layer}."
        for head in range(config.n_heads):
            found[f"L{layer}H{head}"] = End(f"{block}attn.hook_result", layer, head, "head", 2 * layer)
        if not config.attn_only:
            found[f"mlp {layer}"] = End(f"{block}hook_mlp_out", layer, -1, "mlp", 2 * layer + 1)
    return found


def receivers_of(model: nn.Module) -> dict[str, End]:
    """What reads the residual stream, by label."""
    config = _config(model)
    side_by_side = int(getattr(config, "parallel_attn_mlp", False))
    found = {}
    for layer in range(config.n_layers):
        block = f"blocks.{layer}."
        for head in range(config.n_heads):
            for part in "qkv":
                end = End(f"{block}attn.hook_{part}_input", layer, head, part, 2 * layer)
                found[f"L{layer}H{head} {part}"] = end
        if not config.attn_only:
            found[f"mlp {layer}"] = End(f"{block}hook_mlp_in", layer, -1, "mlp", 2 * layer + 1 - side_by_side)
    last = config.n_layers - 1
    found["logits"] = End(f"blocks.{last}.hook_resid_post", -1, -1, "logits", 2 * config.n_layers)
    return found


def _config(model: nn.Module) -> Any:
    if not all(hasattr(model, f"set_{name}") for name in SWITCHES):
        raise SiteError(
            f"{type(model).__name__} has no switches {', '.join(f'set_{name}' for name in SWITCHES)}, so its paths "
            "cannot be told apart. The toys have them, and dy.bridge(model, tokenizer) of a Hugging Face model."
        )
    return model.cfg


@contextmanager
def apart(model: Any) -> Iterator[None]:
    """TransformerLens's switches on inside, as they were afterwards."""
    before = {name: bool(getattr(model.cfg, name)) for name in SWITCHES}
    try:
        for name in SWITCHES:
            getattr(model, f"set_{name}")(True)
        yield
    finally:
        for name, on in before.items():
            getattr(model, f"set_{name}")(on)
