"""Patching verbs, one file each: exchange one quantity at one site, take the step, measure."""

from dynamics.patching.activations import patch_activations as patch_activations
from dynamics.patching.combinations import interactions as interactions
from dynamics.patching.directions import both_directions as both_directions
from dynamics.patching.factors import patch_factors as patch_factors
from dynamics.patching.gradients import patch_gradients as patch_gradients
from dynamics.patching.interchanges import interchange as interchange
from dynamics.patching.parameters import patch_parameters as patch_parameters
from dynamics.patching.paths import patch_paths as patch_paths
from dynamics.patching.shapley import shapley_values as shapley_values
from dynamics.patching.signals import patch_signals as patch_signals
from dynamics.patching.updates import patch_updates as patch_updates
from dynamics.patching.windows import patch_window as patch_window
