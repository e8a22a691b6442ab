"""Placebos of a site: random elements of the parameters that differ as much between two runs as the site does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dynamics.randomness import generator
from dynamics.site_coordinates import PLACEBO
from dynamics.sites.site import Site, coords_of
from dynamics.trees import mask, squared_norm


def placebo(site: Site, difference: Mapping[str, Tensor], n: int = 20, seed: int = 0) -> list[Site]:
    """Random sites of the same ‖Δ‖ as a site, to tell what its size alone would do.

    Elements are drawn from all parameters without replacement until their Σ Δ² reaches the site's.

    Args:
        site: parameters; a site with positions is refused, since Δ does not resolve them.
        difference: Δ, the source update less the base update, by parameter name; over several contrasts its
            root mean square, as `steps.update_difference` gives it.
        n: how many.
        seed: of the draws, which also depend on the site's label.

    Returns:
        n sites of boolean masks; none where the site holds none of Σ Δ², or more than half: no random one of
        that size is another place.
    """
    if site.positions is not None:
        raise ValueError(f"site {site.label!r} has positions; a placebo is matched in whole updates.")
    squares = {name: delta.detach().double().square() for name, delta in difference.items()}
    total = sum(squared_norm(delta) for delta in difference.values())
    wanted = sum(
        float(squares[name][mask(index, squares[name].shape, squares[name].device)].sum())
        for name, index in site.covers.items()
        if name in squares
    )
    if not 0 < wanted <= total / 2:
        return []
    flat = torch.cat([square.flatten() for square in squares.values()]).cpu().numpy()
    sizes = [square.numel() for square in squares.values()]
    sites = []
    for number in range(n):
        order = generator(seed, f"placebo of {site.label}", number).permutation(flat.size)
        taken = int(np.searchsorted(np.cumsum(flat[order]), wanted)) + 1
        chosen = torch.zeros(flat.size, dtype=torch.bool)
        chosen[torch.from_numpy(order[:taken])] = True
        covers = {
            name: part.reshape(squares[name].shape).to(squares[name].device)
            for name, part in zip(squares, torch.split(chosen, sizes), strict=True)
        }
        coords = {**coords_of(PLACEBO, site.label), "draw": number}
        sites.append(Site(f"placebo {number} of {site.label}", covers, coords))
    return sites
