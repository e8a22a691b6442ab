"""The edges of paths by the hooks they begin and end at, as activations are read and written there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dynamics.sites import Site
from dynamics.sites.edges import End, Path


def written_at(paths: Sequence[Path], begins: Mapping[str, End]) -> list[Site]:
    """Sites of the whole activations where the senders of paths write."""
    senders = {sender for site in paths for sender, _ in site.edges}
    hooks = dict.fromkeys(end.hook for sender, end in begins.items() if sender in senders)
    return [Site(hook, {hook: ...}) for hook in hooks]


def by_hooks(
    site: Path, begins: Mapping[str, End], ends: Mapping[str, End]
) -> dict[str, dict[str, list[tuple[int, int]]]]:
    """(receiver's head, sender's head) of a site's edges, by receiver's and sender's hook; 0 without heads."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for sender, receiver in site.edges:
        begin, end = begins[sender], ends[receiver]
        heads = max(end.head, 0), max(begin.head, 0)
        found.setdefault(end.hook, {}).setdefault(begin.hook, []).append(heads)
    return found


def with_heads(activation: Tensor) -> Tensor:
    """[batch, pos, d_model] -> [batch, pos, 1, d_model]; what has heads stays."""
    return activation[:, :, None] if activation.ndim == 3 else activation
