"""Figures of results: Datasets in, matplotlib Figures out; no statistics of their own, nothing global."""

from dynamics.plots.accounts import account, account_map
from dynamics.plots.activations import attribution_against_patching, bars, signed_heads, tiles
from dynamics.plots.curves import accuracies
from dynamics.plots.events import Figures, Panel, event_curves, map_under_accuracies, moved
from dynamics.plots.figures import Figure, save
from dynamics.plots.intervals import recoveries, stored_and_fresh
from dynamics.plots.maps import heatmap, site_by_step, transfer

__all__ = [
    "Figure",
    "Figures",
    "Panel",
    "account",
    "account_map",
    "accuracies",
    "attribution_against_patching",
    "bars",
    "event_curves",
    "heatmap",
    "map_under_accuracies",
    "moved",
    "recoveries",
    "save",
    "signed_heads",
    "site_by_step",
    "stored_and_fresh",
    "tiles",
    "transfer",
]
