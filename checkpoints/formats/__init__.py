"""Checkpoint files of other programs, read into trajectories: state dicts, Lightning, safetensors, Hugging Face."""
