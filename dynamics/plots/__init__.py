"""Figures of results: Datasets in, matplotlib Figures out; no statistics of their own, nothing global."""

from dynamics.plots.activations import attribution_against_patching, bars, signed_heads, tiles
from dynamics.plots.curves import accuracies
from dynamics.plots.figures import save
from dynamics.plots.intervals import recoveries, stored_and_fresh
from dynamics.plots.maps import heatmap, site_by_step

__all__ = [
    "accuracies",
    "attribution_against_patching",
    "bars",
    "heatmap",
    "recoveries",
    "save",
    "signed_heads",
    "site_by_step",
    "stored_and_fresh",
    "tiles",
]
