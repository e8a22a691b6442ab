"""What the verbs share: two runs of a contrast, many models on one probe, gradients along a path. Not public."""
