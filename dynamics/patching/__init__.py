"""Patching verbs, one file each: exchange one quantity at one site, take the step, measure."""

from dynamics.patching.gradients import patch_gradients as patch_gradients
from dynamics.patching.updates import patch_updates as patch_updates
