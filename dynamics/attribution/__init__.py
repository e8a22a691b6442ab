"""Attribution verbs, one file each: read off one gradient of the measure what patching finds one by one."""

from dynamics.attribution.activations import attribute_activations as attribute_activations
from dynamics.attribution.circuits import circuit as circuit
from dynamics.attribution.examples import attribute_examples as attribute_examples
from dynamics.attribution.parameters import attribute_parameters as attribute_parameters
from dynamics.attribution.paths import attribute_paths as attribute_paths
from dynamics.attribution.step import attribute_step as attribute_step
from dynamics.attribution.training import attribute_training as attribute_training
