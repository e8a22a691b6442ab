"""Checkpoints side by side, and quantities along training: what changed, where, and when.

Comparisons take two checkpoints first; what is read off one checkpoint takes (recipe, checkpoint, ...), as the
verbs do. `over_training` makes a curve of either.
"""

from dynamics.comparison.alignment import align_gradients as align_gradients
from dynamics.comparison.alignment import align_groups as align_groups
from dynamics.comparison.alignment import relations as relations
from dynamics.comparison.behaviour import compare_logits as compare_logits
from dynamics.comparison.behaviour import compare_rows as compare_rows
from dynamics.comparison.behaviour import score as score
from dynamics.comparison.change_points import bend as bend
from dynamics.comparison.change_points import level_changes as level_changes
from dynamics.comparison.change_points import order_of_events as order_of_events
from dynamics.comparison.change_points import when as when
from dynamics.comparison.internals import compare_activations as compare_activations
from dynamics.comparison.internals import compare_patterns as compare_patterns
from dynamics.comparison.internals import head_roles as head_roles
from dynamics.comparison.internals import linear_cka as linear_cka
from dynamics.comparison.noise import perturbed as perturbed
from dynamics.comparison.noise import under_noise as under_noise
from dynamics.comparison.pairs import compare as compare
from dynamics.comparison.sizes import step_sizes as step_sizes
from dynamics.comparison.trajectories import over_training as over_training
from dynamics.comparison.weights import compare_updates as compare_updates
from dynamics.comparison.weights import compare_weights as compare_weights
