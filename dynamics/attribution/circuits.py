"""Circuits: the edges whose attribution is large enough, and that lead from the tokens to the answer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr

from dynamics.sites.edges import Edge


def circuit(attributed: xr.Dataset, threshold: float) -> list[str]:
    """The edges that carry at least a share of the difference between base and source run, whatever their sign.

        |mean A| ≥ threshold · |mean(source − base)|, and on a way from the embedding to the logits over such edges

    Keep only these and exchange all others: `patch_paths` with `sites.outside(model, circuit, label)`.

    Args:
        attributed: one edge a site, from `attribute_paths` or `patch_paths`; means are over `example`.
        threshold: share of the difference, above 0.

    Returns:
        Labels of the edges, the strongest first; none where nothing leads from the embedding to the logits.

    Raises:
        ValueError: a site is no single edge, or another dim is left.
    """
    effect = attributed["effect" if "effect" in attributed else "attribution"]
    if "sender" not in attributed.coords or (attributed["sender"] == "").any():
        raise ValueError("a circuit is made of single paths; give a result of sites.paths(model).")
    strength = abs(effect.mean("example"))
    if strength.dims != ("site",):
        raise ValueError(
            f"the dataset has dims {effect.dims}; select one value of each but 'example' and 'site'."
        )
    least = threshold * abs(float((attributed["source"] - attributed["base"]).mean()))
    order = np.argsort(-strength.values, kind="stable")
    chosen = [i for i in order.tolist() if strength.values[i] >= least]
    ends = zip(attributed["sender"].values.tolist(), attributed["receiver"].values.tolist(), strict=True)
    edges = list(ends)
    connected = leading_through(edges[i] for i in chosen)
    return [str(attributed["site"].values[i]) for i in chosen if edges[i] in connected]


def leading_through(edges: Iterable[Edge]) -> set[Edge]:
    """Those of some edges that lie on a way from "embed" to "logits"; a head is entered by its q, k or v."""
    given = set(edges)
    reached, reaching = {"embed"}, {"logits"}
    while True:
        ahead = {_component(receiver) for sender, receiver in given if sender in reached} - reached
        behind = {sender for sender, receiver in given if _component(receiver) in reaching} - reaching
        if not ahead and not behind:
            break
        reached |= ahead
        reaching |= behind
    return {(s, r) for s, r in given if s in reached and _component(r) in reaching}


def _component(receiver: str) -> str:
    """Who reads: "L2H3" for "L2H3 q"; an MLP and the logits are called alike as senders and receivers."""
    return receiver.split(" ")[0] if receiver.startswith("L") else receiver
